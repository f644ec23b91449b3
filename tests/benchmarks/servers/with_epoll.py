"""A bare ``select.epoll`` loop: the limit of what Python can do with one thread.

No tasks, no timeouts, no limits, no clean-up: nothing but the system calls.
"""

from __future__ import annotations

import socket
from select import EPOLLIN, EPOLLOUT, epoll
from socket import MSG_DONTWAIT

from tests.benchmarks.servers import BACKLOG, CHUNK, HOST, Announce


def tcp(announce: Announce) -> None:
    """Echo on every connection."""
    listener = socket.create_server((HOST, 0), backlog=BACKLOG)
    listener.setblocking(False)
    accept, listening = listener.accept, listener.fileno()
    connections: dict[int, socket.socket] = {}
    unsent: dict[int, bytes] = {}
    poller = epoll()
    poller.register(listener, EPOLLIN)
    announce(listener.getsockname()[1])

    def accept_all() -> None:
        while True:
            try:
                connection, _ = accept()
            except BlockingIOError:
                return
            fd = connection.fileno()
            connections[fd] = connection
            # The first message has often arrived with the connection.
            if receive(fd, connection):
                poller.register(fd, EPOLLOUT if fd in unsent else EPOLLIN)

    def receive(fd: int, connection: socket.socket) -> bool:
        """Echo once. False if the connection is over."""
        try:
            # The flag spares the system call that makes the socket non-blocking.
            chunk = connection.recv(CHUNK, MSG_DONTWAIT)
            if chunk:
                sent = connection.send(chunk, MSG_DONTWAIT)
                if sent < len(chunk):
                    unsent[fd] = chunk[sent:]
                return True
        except BlockingIOError:
            return True
        except ConnectionError:
            chunk = b""
        del connections[fd]
        connection.close()
        return False

    while True:
        for fd, events in poller.poll():
            if fd == listening:
                accept_all()
            elif unsent and events & EPOLLOUT and fd in unsent:
                rest = unsent.pop(fd)
                sent = connections[fd].send(rest, MSG_DONTWAIT)
                if sent < len(rest):
                    unsent[fd] = rest[sent:]
                else:
                    poller.modify(fd, EPOLLIN)
            elif receive(fd, connections[fd]) and unsent and fd in unsent:
                poller.modify(fd, EPOLLOUT)


def udp(announce: Announce) -> None:
    """Echo every datagram."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock, epoll() as poller:
        sock.bind((HOST, 0))
        sock.setblocking(False)
        poller.register(sock, EPOLLIN)
        announce(sock.getsockname()[1])
        while True:
            poller.poll()
            try:
                while True:
                    packet, address = sock.recvfrom(CHUNK)
                    sock.sendto(packet, address)
            except BlockingIOError:
                continue
