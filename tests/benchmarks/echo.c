/* A bare epoll echo server in C: what the load generator can drive at most.
 *
 * It does what the epoll server in Python does, call by call, so that the difference between
 * the two is the interpreter. Only `calibrate.py` uses it.
 *
 * usage: echo tcp|udp
 * Prints its port, and serves until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 128, CHUNK = 65536, EVENTS_PER_WAIT = 256 };

static char chunk[CHUNK];

static _Noreturn void die(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(int poller, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

/* Echoes once. Returns 0 if the connection is over: at its end, on an error, and where the
 * client reads so little that the reply has no room. (64-byte lines always have.) */
static int echo(int fd)
{
    ssize_t got = recv(fd, chunk, sizeof chunk, 0);
    if (got > 0)
        return send(fd, chunk, (size_t)got, MSG_NOSIGNAL) == got;
    return got < 0 && errno == EAGAIN;
}

static void echo_datagrams(int fd)
{
    struct sockaddr_in peer;
    for (;;) {
        socklen_t length = sizeof peer;
        ssize_t got =
            recvfrom(fd, chunk, sizeof chunk, 0, (struct sockaddr *)&peer, &length);
        if (got < 0)
            return;
        sendto(fd, chunk, (size_t)got, 0, (struct sockaddr *)&peer, length);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof address;
    int datagrams = argc == 2 && strcmp(argv[1], "udp") == 0;
    int server = socket(AF_INET, (datagrams ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (server < 0 || bind(server, (struct sockaddr *)&address, sizeof address) < 0
        || (!datagrams && listen(server, BACKLOG) < 0)
        || getsockname(server, (struct sockaddr *)&address, &length) < 0)
        die("cannot listen");
    int poller = epoll_create1(0);
    if (poller < 0)
        die("epoll_create1");
    watch(poller, server);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS_PER_WAIT];
        int count = epoll_wait(poller, events, EVENTS_PER_WAIT, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == server && datagrams) {
                echo_datagrams(server);
            } else if (fd == server) {
                while ((fd = accept4(server, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    /* The first message has often arrived with the connection. */
                    if (echo(fd))
                        watch(poller, fd);
                    else
                        close(fd);
                }
            } else if (!echo(fd)) {
                close(fd);
            }
        }
    }
}
