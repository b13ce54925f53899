"""The epoch's store: a TCPStore of torch's that listens where it is told to, and connections to it.

The store listens on a socket that is bound to an explicit address before its port is told to anyone: torch left alone
listens on every interface. It does not authenticate its peers, so a trusted network is its condition.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in __all__

from drumline.protocol.bounded import Call, StoreError, run_bounded
from drumline.protocol.endpoints import bind_tcp
from drumline.protocol.errors import InvalidConfig

_RETRY_S = 0.01
# torch takes a timeout of 0 for none.
_SHORTEST_S = 0.1


def reserve_port(host: str, port: int = 0) -> tuple[socket.socket, int]:
    """A socket that listens on ``host``, an IP address of this machine, and its port; port 0 takes a free one.

    The port may be told to others at once: those who connect wait until the socket is handed to :func:`open_store`, and
    nobody else can take it before. Raises InvalidConfig for an address that is a wildcard, not an IP address or cannot
    be bound.
    """
    return bind_tcp(host, port)


def open_store(
    host: str, port: int = 0, timeout_s: float = 10.0, listener: socket.socket | None = None
) -> tuple[TCPStore, str, int]:
    """Open a store on ``host``, an IP address of this machine; port 0 takes a free one. Returns store, host and port.

    ``listener``, from :func:`reserve_port`, is used in place of a new socket and closed for the caller; ``port`` is
    then its port or 0. The store serves until its last reference is dropped. Raises InvalidConfig as reserve_port does
    and for a listener that listens elsewhere, StoreError when the store does not come up in time.
    """
    if listener is None:
        listener, _ = reserve_port(host, port)
    with listener:
        _check_host(host)
        where, bound = listener.getsockname()[:2]
        if ipaddress.ip_address(where) != ipaddress.ip_address(host) or port not in (0, bound):
            raise InvalidConfig("listener", f"{where} port {bound}", f"a socket that listens on {host} port {port}")
        # torch closes the descriptor it is given.
        descriptor = listener.dup().detach()

    def start(_: Call) -> TCPStore:
        return TCPStore(
            host,
            bound,
            is_master=True,
            timeout=timedelta(seconds=max(timeout_s, _SHORTEST_S)),
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )

    return run_bounded(Call(f"opening the store on {host} port {bound}", timeout_s), start), host, bound


def connect_store(host: str, port: int, timeout_s: float = 10.0, abandoned: threading.Event | None = None) -> TCPStore:
    """Connect to a store that :func:`open_store` opened, or will open, perhaps elsewhere.

    Raises StoreError when nothing that speaks the store's protocol answers within ``timeout_s``, or when ``abandoned``
    is set meanwhile.
    """
    _check_host(host)
    if not 1 <= port <= 65535:
        raise InvalidConfig("port", port, "1 to 65535")

    def connect(call: Call) -> TCPStore:
        _await_listener(host, port, call)
        limit = timedelta(seconds=max(timeout_s, _SHORTEST_S))
        return TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)

    return run_bounded(Call(f"connecting to the store on {host} port {port}", timeout_s), connect, abandoned)


def _check_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise InvalidConfig("host", host, "an IP address") from None
    if ip.is_unspecified:
        raise InvalidConfig("host", host, "one address; a wildcard is never bound")
    return ip


def _await_listener(host: str, port: int, call: Call) -> None:
    """Return when something accepts connections there: torch's own retries overrun their timeout and fill the log."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.001, call.left_s)) as probe:
                # A port that nobody listens on can be met from itself.
                if probe.getsockname() != probe.getpeername():
                    return
            error: OSError = ConnectionRefusedError("nobody listens there")
        except OSError as failure:
            error = failure
        if call.over() or call.left_s <= _RETRY_S:
            text = f"the store on {host} port {port} cannot be reached within {call.timeout_s:g} s: {error}"
            raise StoreError(text) from error
        time.sleep(_RETRY_S)
