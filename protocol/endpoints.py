"""Which addresses a socket of ours may bind or connect to."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path

from drumline.protocol.errors import InvalidConfig

# sun_path holds 108 bytes on Linux; the rest is left for suffixes that a listener may add.
MAX_IPC_PATH_BYTES = 100
BACKLOG = 1024

VALID = "ipc:///absolute/path (at most 100 bytes) or tcp://127.0.0.1:PORT"
_NEEDS_KEYS = "a loopback address; any other interface needs CURVE keys on both sides, and none are configured"


def check_endpoint(endpoint: str) -> None:
    """Refuse an endpoint that would be open to more than this machine, or could not work.

    Accepted are ``ipc://`` with an absolute path of at most 100 bytes and ``tcp://`` on a loopback address, port 0
    meaning a free one. Raises InvalidConfig with ``field`` endpoint for anything else, wildcards by name.
    """
    scheme, separator, rest = endpoint.partition("://")
    if not separator or scheme not in ("ipc", "tcp"):
        raise InvalidConfig("endpoint", endpoint, VALID)
    if scheme == "ipc":
        _check_path(endpoint, rest)
    else:
        _check_address(endpoint, rest)


def _check_path(endpoint: str, path: str) -> None:
    if path.startswith("@"):
        raise InvalidConfig("endpoint", endpoint, f"{VALID}; an abstract socket has no owner and no permissions")
    if "\0" in path or not path.startswith("/"):
        raise InvalidConfig("endpoint", endpoint, VALID)
    length = len(os.fsencode(path))
    if length > MAX_IPC_PATH_BYTES:
        raise InvalidConfig("endpoint", f"{endpoint} ({length} bytes)", f"a path of at most {MAX_IPC_PATH_BYTES} bytes")


def _check_address(endpoint: str, address: str) -> None:
    host, separator, port = address.rpartition(":")
    if not separator or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise InvalidConfig("endpoint", endpoint, "tcp://ADDRESS:PORT with a port from 0 to 65535 (0: a free one)")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InvalidConfig("endpoint", endpoint, "an IPv6 address in brackets, as in tcp://[::1]:0")
    if host in ("*", ""):
        raise InvalidConfig("endpoint", endpoint, f"{_NEEDS_KEYS}; a wildcard is never bound")
    if host == "localhost":
        return
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise InvalidConfig("endpoint", endpoint, f"an IP address or localhost, {_NEEDS_KEYS}") from None
    if ip.is_unspecified:
        raise InvalidConfig("endpoint", endpoint, f"{_NEEDS_KEYS}; a wildcard is never bound")
    if not ip.is_loopback:
        raise InvalidConfig("endpoint", endpoint, _NEEDS_KEYS)


def bind_tcp(host: str, port: int = 0) -> tuple[socket.socket, int]:
    """A TCP socket that listens on ``host``, an address of this machine, at ``port`` (0: a free one), and its port.

    Whoever publishes the port keeps the socket, or hands it on, so that nobody else can take the port in between.
    Raises InvalidConfig with ``field`` host or port for a wildcard, a name, or what cannot be bound.
    """
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise InvalidConfig("host", host, "an IP address of this machine, such as 127.0.0.1") from None
    if ip.is_unspecified:
        raise InvalidConfig("host", host, "one address, such as 127.0.0.1; a wildcard is never bound")
    if not 0 <= port <= 65535:
        raise InvalidConfig("port", port, "0 (a free one) to 65535")
    bound = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # With a port of the kernel's choice this would allow one that somebody else has bound in the same way.
        if port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        # Two sockets may share a port that neither of them listens on.
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            valid = "an address of this machine, such as 127.0.0.1"
            raise InvalidConfig("host", f"{host} ({error.strerror})", valid) from error
        found = f"{port} on {host} ({error.strerror})"
        raise InvalidConfig("port", found, "0 (a free one), or a port that no other process listens on") from error
    return bound, int(bound.getsockname()[1])


def clear_stale_path(endpoint: str) -> None:
    """Remove a socket file that nobody listens on, before a bind.

    ZeroMQ removes whatever stands there, so a second engine would take the endpoint of a living one in silence. Raises
    InvalidConfig when somebody listens, when the path is not a socket, and when its folder is missing.
    """
    if not endpoint.startswith("ipc://"):
        return
    path = Path(endpoint.removeprefix("ipc://"))
    if not path.parent.is_dir():
        raise InvalidConfig("endpoint", endpoint, f"a path in an existing folder; {path.parent} is none")
    if not path.exists():
        return
    if not path.is_socket():
        raise InvalidConfig("endpoint", endpoint, "a path where nothing else stands")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        failure = probe.connect_ex(str(path))
    # EAGAIN means a listener whose backlog is full.
    if failure in (0, errno.EAGAIN):
        raise InvalidConfig("endpoint", endpoint, "a path that no other process listens on")
    path.unlink(missing_ok=True)
