/* The load: one thread, one epoll, N clients, each in a closed loop.
 *
 * A client sends one message, waits for the same bytes to come back, and goes on at once.
 * So the number of requests in flight is the number of clients, and the server is never
 * asked for more than it can give: what is measured is its capacity, and the latency there.
 *
 *   short     connect, one message, one reply, close; and again
 *   pingpong  messages on connections that stay open
 *   udp       datagrams, one in flight per client; a lost one is sent again
 *   idle      connections that are greeted once and then say nothing, until stdin ends
 *
 * Connections are closed the normal way, by the client, after the whole reply. Closing with a
 * reset would spare TIME_WAIT, but the server would then see an error where it should see
 * end-of-file. Instead connections come from many loopback addresses, each with its own ports.
 *
 * When time is up no new request is sent, and the replies under way are still read, so that
 * no server sees a reset at the end either. What ends after time is up is not counted.
 *
 * What it costs is nearly all the kernel's: 97 % of its time, by perf. Sending takes 79 % of
 * ping-pong, because on loopback send() also does the receiving server's TCP; connecting takes
 * 42 % and closing 20 % of short connections. What could be spared, is: epoll is edge-triggered
 * (6 % of ping-pong: no second look at each socket), and the clock is read once a request.
 *
 * usage: load short|pingpong|udp PORT CLIENTS SIZE SECONDS
 *        load idle PORT CLIENTS
 *
 * When all connections are open it prints "open", and waits for a line. After the run it
 * prints one line of JSON, and waits for the end of stdin before it closes them. So whoever
 * started it can look at the server in between, and opening and closing are not in what he
 * sees. A load of idle connections has no run: it only waits for the end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

enum mode { SHORT, PINGPONG, UDP, IDLE };

/* Linux has 28,232 ephemeral ports per source address by default, and looks for a free one
 * more slowly the fuller the range is. 128 addresses are 3.6 million connections. */
enum { SOURCES = 128 };

enum { EVENTS_PER_WAIT = 256, SCRATCH_BYTES = 1 << 18, MAX_DATAGRAM = 65507 };

/* A load that mostly fails measures nothing: give up beyond this many errors. */
enum { MAX_ERRORS = 1000 };

static const uint64_t SECOND = 1000000000;           /* all times are in nanoseconds */
static const uint64_t RESEND_AFTER = 200 * 1000000;  /* loopback answers in under 20 ms */
static const uint64_t DRAIN_FOR = 3 * 1000000000ULL; /* a SYN the server dropped is retried after 1 s */

struct client {
    int fd;
    bool wants_write;
    size_t sent, received;
    uint64_t started;    /* when this request began */
    uint64_t last_sent;  /* udp: when it was last sent */
    uint32_t sequence;   /* udp: tells this reply from a late one */
    char *message;
};

static enum mode mode;
static struct sockaddr_in server;
static size_t size;
static int poller;
static struct client *clients;
static size_t client_count, in_flight;
static uint64_t deadline;
static bool draining;
static uint64_t began;
static uint64_t operations, errors, lost, unanswered;
static char scratch[SCRATCH_BYTES];

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void failed(const char *what)
{
    if (errors++ == 0)
        fprintf(stderr, "load: first error: %s: %s\n", what, strerror(errno));
    if (errors > MAX_ERRORS) {
        fprintf(stderr, "load: more than %d errors, giving up\n", MAX_ERRORS);
        exit(1);
    }
}

/* Latencies: 32 buckets per power of two, so a percentile is right within 3 %. */

enum { SUB_BITS = 5, SUB = 1 << SUB_BITS, BUCKETS = 64 * SUB };
static uint64_t histogram[BUCKETS];

static size_t bucket_of(uint64_t value)
{
    if (value < SUB)
        return value;
    unsigned shift = 63 - (unsigned)__builtin_clzll(value) - SUB_BITS;
    return (size_t)(shift + 1) * SUB + ((value >> shift) - SUB);
}

static uint64_t middle_of(size_t bucket)
{
    if (bucket < SUB)
        return bucket;
    unsigned shift = (unsigned)(bucket / SUB) - 1;
    return ((SUB + bucket % SUB) << shift) + ((1ULL << shift) >> 1);
}

static double percentile_us(double share)
{
    uint64_t rank = (uint64_t)(share * (double)operations), seen = 0;
    for (size_t i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen > rank)
            return (double)middle_of(i) / 1000;
    }
    return 0;
}

/* A client's life. */

static void set_interest(struct client *c, int operation, bool write)
{
    /* Connections are read until there is no more, so that changes are all there is to tell.
     * Of datagrams one is read at a time: a late one may be followed by the right one. */
    uint32_t trigger = mode == UDP ? 0 : (uint32_t)EPOLLET;
    struct epoll_event event = {.events = EPOLLIN | trigger | (write ? EPOLLOUT : 0),
                                .data.ptr = c};
    if (epoll_ctl(poller, operation, c->fd, &event) < 0)
        die("epoll_ctl");
    c->wants_write = write;
}

static void bind_to_next_source(int fd)
{
    static uint32_t next;
    struct sockaddr_in source = {.sin_family = AF_INET};
    int on = 1;
    /* 127.0.1.1 and on. Without this option bind() itself reserves a port, for any peer. */
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 256 + next++ % SOURCES);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
        die("bind to a 127.0.1.x address");
}

static bool connect_client(struct client *c, int flags)
{
    int type = mode == UDP ? SOCK_DGRAM : SOCK_STREAM;
    for (int attempt = 0; attempt < SOURCES; attempt++) {
        c->fd = socket(AF_INET, type | flags | SOCK_CLOEXEC, 0);
        if (c->fd < 0)
            die("socket");
        if (mode != UDP)
            bind_to_next_source(c->fd);
        if (connect(c->fd, (struct sockaddr *)&server, sizeof server) == 0
            || errno == EINPROGRESS)
            return true;
        int reason = errno;
        close(c->fd);
        errno = reason;
        if (reason != EADDRNOTAVAIL) /* this source has no port left: the next one may */
            break;
    }
    c->fd = -1;
    return false;
}

static void drop(struct client *c)
{
    close(c->fd);
    c->fd = -1;
    in_flight--;
}

/* Returns false if the connection is broken. */
static bool push(struct client *c)
{
    while (c->sent < size) {
        ssize_t n = send(c->fd, c->message + c->sent, size - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN)
                return false;
            if (!c->wants_write)
                set_interest(c, EPOLL_CTL_MOD, true);
            return true;
        }
        c->sent += (size_t)n;
    }
    if (c->wants_write)
        set_interest(c, EPOLL_CTL_MOD, false);
    return true;
}

static bool push_datagram(struct client *c, uint64_t at)
{
    c->last_sent = at;
    if (send(c->fd, c->message, size, MSG_NOSIGNAL) >= 0)
        return true;
    return errno == EAGAIN || errno == ENOBUFS; /* lost, then: it will be sent again */
}

/* Sends a client's next request. A client that cannot is out of the game. */
static void begin(struct client *c, uint64_t at)
{
    c->started = at;
    c->sent = c->received = 0;
    in_flight++;
    if (mode == SHORT) {
        if (!connect_client(c, SOCK_NONBLOCK)) {
            failed("connect");
            in_flight--;
            return;
        }
        /* The handshake is usually over when connect() returns: try to send at once. */
        ssize_t n = send(c->fd, c->message, size, MSG_NOSIGNAL);
        if (n > 0)
            c->sent = (size_t)n;
        set_interest(c, EPOLL_CTL_ADD, c->sent < size);
        return;
    }
    if (mode == UDP) {
        c->sequence++;
        memcpy(c->message, &c->sequence, sizeof c->sequence);
        if (!push_datagram(c, at))
            failed("send");
        return;
    }
    if (!push(c)) {
        failed("send");
        drop(c);
    }
}

static void begin_next(struct client *c, uint64_t at)
{
    draining |= at >= deadline;
    if (!draining)
        begin(c, at);
}

static void broken(struct client *c, const char *what)
{
    failed(what);
    drop(c);
    if (mode == SHORT)
        begin_next(c, now());
}

static void complete(struct client *c)
{
    uint64_t at = now();
    if (!draining && at < deadline) {
        operations++;
        histogram[bucket_of(at - c->started)]++;
    }
    if (mode == SHORT)
        drop(c);
    else
        in_flight--;
    begin_next(c, at);
}

static void pull(struct client *c)
{
    for (;;) {
        ssize_t n = recv(c->fd, scratch, sizeof scratch, 0);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            errno = n == 0 ? ECONNRESET : errno;
            broken(c, n == 0 ? "the server closed before the whole reply" : "recv");
            return;
        }
        size_t got = (size_t)n;
        if (c->received + got > size || memcmp(scratch, c->message + c->received, got) != 0) {
            errno = EBADMSG;
            broken(c, "the reply is not the echo of the request");
            return;
        }
        c->received += got;
        if (c->received == size) {
            complete(c);
            return;
        }
        if (got < sizeof scratch) /* a short read: there was no more */
            return;
    }
}

static void pull_datagram(struct client *c)
{
    ssize_t n = recv(c->fd, scratch, sizeof scratch, 0);
    if (n < 0) {
        if (errno != EAGAIN)
            failed("recv");
        return;
    }
    uint32_t sequence;
    if ((size_t)n == size) {
        memcpy(&sequence, scratch, sizeof sequence);
        if (sequence != c->sequence)
            return; /* the late reply to a datagram given up as lost */
        if (memcmp(scratch, c->message, size) == 0) {
            complete(c);
            return;
        }
    }
    errno = EBADMSG;
    failed("the reply is not the echo of the request");
}

static void resend_lost(void)
{
    uint64_t at = now();
    for (size_t i = 0; i < client_count; i++) {
        struct client *c = &clients[i];
        if (at - c->last_sent > RESEND_AFTER) {
            lost++;
            if (!push_datagram(c, at))
                failed("send");
        }
    }
}

/* Connects, and sees one line echoed: a connection counts once a handler has it. */
static void open_and_greet(struct client *c)
{
    struct timeval patience = {.tv_sec = 10};
    int on = 1;
    if (!connect_client(c, 0))
        die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (send(c->fd, "\n", 1, MSG_NOSIGNAL) != 1 || recv(c->fd, scratch, 1, 0) != 1)
        die("a connection got no answer");
    if (fcntl(c->fd, F_SETFL, O_NONBLOCK) < 0)
        die("fcntl");
}

static void make_clients(void)
{
    clients = calloc(client_count, sizeof *clients);
    if (clients == NULL)
        die("calloc");
    for (size_t i = 0; i < client_count; i++) {
        struct client *c = &clients[i];
        if ((c->message = malloc(size)) == NULL)
            die("malloc");
        /* Every client has a text of its own, so that mixed-up replies are seen. */
        for (size_t j = 0; j < size; j++)
            c->message[j] = (char)('a' + (i * 7 + j * (i % 25 + 1)) % 26);
        c->message[size - 1] = '\n';
        if (mode == SHORT)
            continue;
        if (mode == PINGPONG || mode == IDLE)
            open_and_greet(c);
        else if (!connect_client(c, SOCK_NONBLOCK))
            die("connect");
        if (mode != IDLE)
            set_interest(c, EPOLL_CTL_ADD, false);
    }
}

/* Returns false at the end of stdin. */
static bool wait_for_line(void)
{
    char byte;
    fflush(stdout);
    return read(STDIN_FILENO, &byte, 1) > 0;
}

static void allow_descriptors(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        die("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
        die("setrlimit");
}

static void run(uint64_t duration)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    uint64_t next_look = 0;

    began = now();
    deadline = began + duration;
    for (size_t i = 0; i < client_count; i++)
        begin(&clients[i], now());
    while (in_flight > 0) {
        int n = epoll_wait(poller, events, EVENTS_PER_WAIT, 50);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            struct client *c = events[i].data.ptr;
            if (mode == UDP) {
                pull_datagram(c);
                continue;
            }
            if ((events[i].events & EPOLLOUT) && !push(c)) {
                broken(c, "send");
                continue;
            }
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                pull(c);
        }
        if (n == EVENTS_PER_WAIT)
            continue;
        uint64_t at = now();
        if (at > deadline + (mode == UDP ? RESEND_AFTER : DRAIN_FOR))
            break;
        if (mode == UDP && !draining && at > next_look) {
            resend_lost();
            next_look = at + RESEND_AFTER / 4;
        }
    }
    unanswered = in_flight;
}

static double cpu_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
         + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void report(double cpu)
{
    printf("{\"operations\": %llu, \"seconds\": %.6f, \"errors\": %llu, \"lost\": %llu, "
           "\"unanswered\": %llu, \"cpu_seconds\": %.6f, "
           "\"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f}\n",
           (unsigned long long)operations, (double)(deadline - began) / 1e9,
           (unsigned long long)errors, (unsigned long long)lost,
           (unsigned long long)unanswered, cpu,
           percentile_us(0.50), percentile_us(0.90), percentile_us(0.99), percentile_us(0.999));
}

static enum mode mode_named(const char *name)
{
    static const char *const names[] = {"short", "pingpong", "udp", "idle"};
    for (int i = SHORT; i <= IDLE; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum mode)i;
    fprintf(stderr, "load: unknown mode %s\n", name);
    exit(2);
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc != (mode_named(argv[1]) == IDLE ? 4 : 6)) {
        fprintf(stderr, "usage: load short|pingpong|udp PORT CLIENTS SIZE SECONDS\n"
                        "       load idle PORT CLIENTS\n");
        return 2;
    }
    mode = mode_named(argv[1]);
    server.sin_family = AF_INET;
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server.sin_port = htons((uint16_t)atoi(argv[2]));
    client_count = strtoul(argv[3], NULL, 10);
    size = mode == IDLE ? 8 : strtoul(argv[4], NULL, 10);
    double seconds = mode == IDLE ? 1 : strtod(argv[5], NULL);
    if (client_count < 1 || size < 8 || seconds <= 0 || (mode == UDP && size > MAX_DATAGRAM)) {
        fprintf(stderr, "load: CLIENTS, SIZE or SECONDS makes no sense\n");
        return 2;
    }
    allow_descriptors();
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0)
        die("epoll_create1");
    make_clients();
    puts("open");
    if (wait_for_line() && mode != IDLE) {
        double cpu_before = cpu_seconds();
        run((uint64_t)(seconds * 1e9));
        report(cpu_seconds() - cpu_before);
        wait_for_line();
    }
    return 0;
}
