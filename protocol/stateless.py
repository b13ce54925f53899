"""Groups without global state, on a TCPStore that lives as long as its epoch. The only module here that needs torch.

The store listens on a socket that is bound to an explicit address before its port is told to anyone: torch left alone
listens on every interface. Neither store nor tensor plane authenticates its peers, so a trusted network is their
condition.

torch's client does not keep its own timeouts (a peer that accepts and never answers hangs it for good), therefore every
operation runs on a thread of its own that is given up at the deadline. Groups carry metadata while an epoch forms,
never anything per step.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # exported, but not in __all__

from drumline.protocol.errors import DrumlineError, InvalidConfig, ProtocolError

R = TypeVar("R")

MAX_OBJECT_BYTES = 8 << 20
# Beyond the deadline of an operation, how long a store may take to answer before its thread is given up.
_GRACE_S = 0.5
_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.01
_LOOK_S = 0.05
_BACKLOG = 1024


class StoreError(DrumlineError):
    """The epoch's store, or a peer that was waited for there, did not answer in time. A new epoch may do better."""

    kind = "store"
    retryable = True


def open_store(host: str, port: int = 0, timeout_s: float = 10.0) -> tuple[TCPStore, str, int]:
    """Open a store on ``host``, an IP address of this machine; port 0 takes a free one. Returns store, host and port.

    The store serves until its last reference is dropped. Raises InvalidConfig for an address that is a wildcard, not an
    IP address or cannot be bound, StoreError when the store does not come up in time.
    """
    ip = _check_host(host)
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            raise InvalidConfig("host", f"{host} port {port} ({error})", "an address of this machine") from error
        bound = int(listener.getsockname()[1])
        # torch closes the descriptor it is given.
        descriptor = listener.dup().detach()

    def start(_: Callable[[], bool]) -> TCPStore:
        return TCPStore(
            host,
            bound,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )

    return _bounded(f"opening the store on {host} port {bound}", timeout_s, start), host, bound


def connect_store(host: str, port: int, timeout_s: float = 10.0, abandoned: threading.Event | None = None) -> TCPStore:
    """Connect to a store that :func:`open_store` opened, perhaps elsewhere.

    Raises StoreError when nothing that speaks the store's protocol answers within ``timeout_s``, or when ``abandoned``
    is set meanwhile.
    """
    _check_host(host)
    if not 1 <= port <= 65535:
        raise InvalidConfig("port", port, "1 to 65535")
    deadline = time.monotonic() + timeout_s

    def connect(stopped: Callable[[], bool]) -> TCPStore:
        _await_listener(host, port, deadline, stopped)
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)

    return _bounded(f"connecting to the store on {host} port {port}", timeout_s, connect, abandoned)


def group_prefix(term: int, epoch: int, group: str) -> str:
    """The prefix of every key of one group in one epoch; for PrefixStore too."""
    return f"{term}.{epoch}/{group}"


class StatelessGroup:
    """Ranks of one epoch that exchange small objects through its store.

    Every member calls the same operations in the same order. Objects are what msgspec's msgpack carries, at most 8 MiB.
    Keys are ``term.epoch/group/kind/seq/src/dst``, so nothing of another epoch or operation can be taken for an answer;
    a member deletes what it wrote once it knows that all have read it. Not for use by several threads.
    """

    def __init__(
        self,
        store: Store,
        term: int,
        epoch: int,
        group: str,
        rank: int,
        members: Sequence[int],
        abandoned: threading.Event | None = None,
    ) -> None:
        """``members`` are the global ranks of the group, ``rank`` one of them. Setting ``abandoned`` ends any wait."""
        if rank not in members or len(set(members)) != len(members):
            raise ProtocolError(f"rank {rank} and the members {list(members)} make no group")
        self.rank = rank
        self.members = tuple(members)
        self.name = group_prefix(term, epoch, group)
        self._store = store
        self._abandoned = abandoned
        self._seq = 0
        self._written: list[str] = []

    def key(self, kind: str, seq: int, src: int, dst: int | str = "all") -> str:
        """The key under which ``src`` leaves the object of operation number ``seq`` for ``dst``."""
        return f"{self.name}/{kind}/{seq}/{src}/{dst}"

    def barrier(self, timeout_s: float) -> None:
        """Return when every member has called this. Raises StoreError that names the ranks that have not."""
        self._gather("barrier", b"", timeout_s)

    def all_gather_obj(self, value: Any, timeout_s: float, as_type: Any = Any) -> list[Any]:
        """The objects of all members, in the order of ``members``, decoded as ``as_type``.

        Raises StoreError that names the ranks whose object did not come, ProtocolError for one that does not decode.
        """
        return [_decode(raw, as_type) for raw in self._gather("gather", _encode(value), timeout_s)]

    def broadcast_obj(self, value: Any, src: int, timeout_s: float, as_type: Any = Any) -> Any:
        """``src``'s object, decoded as ``as_type`` (on ``src`` itself: ``value`` as it is). Errors as above."""
        if src not in self.members:
            raise ProtocolError(f"rank {src} is not a member of {self.name}: {list(self.members)}")
        seq = self._next()
        key = self.key("broadcast", seq, src)
        if src == self.rank:
            raw = _encode(value)
            self._run(f"broadcast {seq}", timeout_s, lambda _: self._set(key, raw))
            self._written.append(key)
            return value
        deadline = time.monotonic() + timeout_s

        def receive(stopped: Callable[[], bool]) -> bytes:
            self._wait(f"broadcast {seq}", {src: key}, deadline, timeout_s, stopped)
            return bytes(self._store.get(key))

        return _decode(self._run(f"broadcast {seq}", timeout_s, receive), as_type)

    def _gather(self, kind: str, raw: bytes, timeout_s: float) -> list[bytes]:
        seq = self._next()
        keys = {member: self.key(kind, seq, member) for member in self.members}
        deadline = time.monotonic() + timeout_s

        def exchange(stopped: Callable[[], bool]) -> list[bytes]:
            self._set(keys[self.rank], raw)
            self._wait(f"{kind} {seq}", keys, deadline, timeout_s, stopped)
            values = [bytes(self._store.get(key)) for key in keys.values()] if raw else []
            # All have begun this operation, so all have ended the ones before it.
            for old in self._written:
                self._store.delete_key(old)
            return values

        values = self._run(f"{kind} {seq}", timeout_s, exchange)
        self._written = [keys[self.rank]]
        return values

    def _set(self, key: str, raw: bytes) -> None:
        self._store.set(key, raw)  # type: ignore[arg-type]  # takes bytes; its stub says str

    def _wait(
        self, what: str, keys: dict[int, str], deadline: float, timeout_s: float, stopped: Callable[[], bool]
    ) -> None:
        """Ask until all keys are there. Store.wait would do, but cannot be abandoned and logs every timeout."""
        wanted = list(keys.values())
        pause = _FIRST_PAUSE_S
        while not self._store.check(wanted):
            if stopped() or time.monotonic() >= deadline:
                missing = [rank for rank, key in keys.items() if not self._store.check([key])]
                ranks = ", ".join(str(rank) for rank in missing)
                raise StoreError(f"{what} of {self.name}: nothing from rank {ranks} within {timeout_s:g} s")
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)

    def _run(self, what: str, timeout_s: float, operation: Callable[[Callable[[], bool]], R]) -> R:
        return _bounded(f"{what} of {self.name}", timeout_s, operation, self._abandoned)

    def _next(self) -> int:
        self._seq += 1
        return self._seq


def _check_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise InvalidConfig("host", host, "an IP address") from None
    if ip.is_unspecified:
        raise InvalidConfig("host", host, "one address; a wildcard is never bound")
    return ip


def _await_listener(host: str, port: int, deadline: float, stopped: Callable[[], bool]) -> None:
    """Return when something accepts connections there: torch's own retries overrun their timeout and fill the log."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.001, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if stopped() or time.monotonic() + _LONGEST_PAUSE_S >= deadline:
                raise StoreError(f"the store on {host} port {port} cannot be reached: {error}") from error
        time.sleep(_LONGEST_PAUSE_S)


def _encode(value: Any) -> bytes:
    raw = msgspec.msgpack.encode(value)
    if len(raw) > MAX_OBJECT_BYTES:
        raise ProtocolError(f"an object of {len(raw)} bytes for a group; the limit is {MAX_OBJECT_BYTES}")
    return raw


def _decode(raw: bytes, as_type: Any) -> Any:
    try:
        return msgspec.msgpack.decode(raw, type=as_type)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"an object of a group that does not decode: {error}") from error


def _bounded(
    what: str,
    timeout_s: float,
    operation: Callable[[Callable[[], bool]], R],
    abandoned: threading.Event | None = None,
) -> R:
    """Run ``operation`` on a daemon thread and leave it behind when it is not back in time.

    The thread that is left behind ends when the connection it hangs on does. ``operation`` is told through its argument
    when nobody waits for it any more.
    """
    done, stopped = threading.Event(), threading.Event()
    results: list[R] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(operation(stopped.is_set))
        except BaseException as error:  # carried to the thread that waits
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=body, name=f"drumline: {what}", daemon=True).start()
    deadline = time.monotonic() + timeout_s + _GRACE_S
    while not done.wait(_LOOK_S):
        if abandoned is not None and abandoned.is_set():
            stopped.set()
            raise StoreError(f"{what}: abandoned")
        if time.monotonic() >= deadline:
            stopped.set()
            raise StoreError(f"{what}: no answer within {timeout_s:g} s")
    if not failures:
        return results[0]
    error = failures[0]
    if isinstance(error, DrumlineError) or not isinstance(error, RuntimeError):
        raise error
    # torch adds a C++ trace after the first line.
    reason = str(error).partition("\n")[0]
    raise StoreError(f"{what}: {reason}") from error
