"""The sockets that a server listens on: made before it starts, and closed so that nobody who has connected is lost."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import resource
import select
import socket
import struct
from contextlib import suppress
from ipaddress import ip_address

from modelcache.errors import ModelCacheError

_TCP_FLAGS, _SYN = 13, 2
_IGNORE_NEW_CLIENTS = (  # code, jump if true, jump if false, operand: the machine code of the kernel's packet filters
    (0x30, 0, 0, _TCP_FLAGS),  # load a byte
    (0x45, 0, 1, _SYN),  # test its bits
    (0x06, 0, 0, 0),  # drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # let it pass
)
_SO_ATTACH_FILTER = 26
_ARRIVAL = 0.05
"""Seconds in which the loop makes a connection of a client it has accepted; with its server closed it could not."""
_WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - told apart, not bound to


class ListenError(ModelCacheError):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet, so that nobody connects before there is a server."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "something listens there already; choose another port" if in_use else str(error)
        raise ListenError(f"Port {port} of {host} cannot be listened on: {reason}.") from error
    bound.setblocking(False)
    return bound


def url_of(listener: socket.socket) -> str:
    """Return the URL that a client on this host can use."""
    host, port = listener.getsockname()[:2]
    if host in _WILDCARDS:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Say whether only this host can connect to ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allow_many_connections() -> None:
    """Raise the limit of open files to what the system allows this process; many systems begin with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says "unlimited", and takes less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def accept_the_last(listeners: list[socket.socket]) -> None:
    """Return when the loop has accepted all clients who have connected; the listeners are to be closed at once then.

    A client is connected before its server knows: the kernel answers it, and queues it. To close the listener resets
    those in the queue. On Linux newcomers are ignored from now on (they try again, and find nobody or another server),
    so that the queue stays empty once it is.
    """
    for listener in listeners:
        _ignore_new_clients(listener)
    waiting = select.poll()
    for listener in listeners:
        waiting.register(listener, select.POLLIN)
    await asyncio.sleep(_ARRIVAL)
    while waiting.poll(0):  # noqa: ASYNC110 - the loop accepts as it turns, and sets no event
        await asyncio.sleep(_ARRIVAL)


def _ignore_new_clients(listener: socket.socket) -> None:
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _IGNORE_NEW_CLIENTS))
    header = struct.pack("HP", len(_IGNORE_NEW_CLIENTS), ctypes.addressof(program))
    with suppress(OSError):  # not on this system: a client may come between the last look and the end
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)
