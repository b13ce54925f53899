"""Groups without global state, on a TCPStore that lives as long as its epoch.

They carry small objects, as msgspec's msgpack, while an epoch forms: metadata, never anything per step. Every operation
keeps its deadline whatever the store does.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in __all__

from drumline.protocol.bounded import Call, StoreError, poll
from drumline.protocol.errors import InvalidConfig, ProtocolError
from drumline.protocol.objects import decode_object, encode_object
from drumline.protocol.outbox import Lane
from drumline.protocol.point_to_point import PointToPoint
from drumline.protocol.store import connect_store, open_store, reserve_port
from drumline.protocol.store_session import StoreSession

__all__ = ["StatelessGroup", "StoreError", "connect_store", "group_prefix", "open_store", "reserve_port"]

BARRIER_TIMEOUT_S = 30.0
DATA_EXPIRATION_S = 3600.0
STORE_TIMEOUT_S = 300.0


def group_prefix(term: int, epoch: int, group: str) -> str:
    """The prefix of every key of one group in one epoch; for PrefixStore too."""
    return f"{term}.{epoch}/{group}"


class StatelessGroup:
    """Ranks that exchange small objects through a store. Not for use by several threads.

    Every member calls the collectives (barrier, all_gather_obj, broadcast_obj) in the same order; send_obj and recv_obj
    pair up by themselves, in the order of the sends. Objects are what msgspec's msgpack carries, at most 8 MiB. Keys
    are ``term.epoch/group/kind/seq/src/dst``, so nothing of another epoch, group, sender or operation can be taken for
    an answer; a name makes a group once per epoch and store.

    A member deletes what it wrote once it knows that all have read it, a receiver what was sent to it alone. A group
    never has more than ``outbox.MAX_UNREAD`` objects per reader in the store, and a few keys per pair of members.

    Errors: StoreError for a peer or a store that does not answer in time, ProtocolError for what no group may do. A
    collective that failed is over for this member, whatever the others say; a receive can be tried again.
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
        *,
        data_expiration_seconds: float = DATA_EXPIRATION_S,
        store_timeout: float = STORE_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``members`` are the global ranks of the group, ``rank`` one of them. Setting ``abandoned`` ends any wait.

        What nobody fetched for ``data_expiration_seconds``, by ``clock``, is deleted. ``store_timeout``: the timeout,
        in seconds, of operations that are given none.
        """
        if rank not in members or len(set(members)) != len(members):
            raise ProtocolError(f"rank {rank} and the members {list(members)} make no group")
        _check_seconds(data_expiration_seconds, store_timeout)
        self.rank = rank
        self.members = tuple(members)
        self.name = group_prefix(term, epoch, group)
        self._others = tuple(member for member in members if member != rank)
        self._session = StoreSession(store, abandoned)
        self._data_expiration_s = data_expiration_seconds
        self._store_timeout_s = store_timeout
        self._clock = clock
        self._owns_store = self._closed = False
        self._seq = 0
        self._gathered, self._broadcast = Lane(), Lane()
        self._pairs = PointToPoint(self._session, rank, self.key, clock)

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: float = DATA_EXPIRATION_S,
        store_timeout: float = STORE_TIMEOUT_S,
        *,
        listener: socket.socket | None = None,
        abandoned: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> StatelessGroup:
        """A group of the ranks 0 to ``world_size`` - 1 with a store of its own. Returns when all have come.

        Rank 0 opens the store on ``host`` and ``port``, the others connect to it; it lives until rank 0's group is
        closed or dropped. For a port of the kernel's choice rank 0 calls :func:`reserve_port`, tells the others the
        port and passes the socket as ``listener``. A process may be in any number of groups.

        Raises InvalidConfig for arguments that make no group, StoreError within ``store_timeout`` seconds when the
        store cannot be reached or ranks do not come; names them.
        """
        if world_size < 1:
            raise InvalidConfig("world_size", world_size, "1 or more")
        if not 0 <= rank < world_size:
            raise InvalidConfig("rank", rank, f"0 to {world_size - 1}")
        if not 1 <= port <= 65535:
            raise InvalidConfig("port", port, "1 to 65535; reserve_port takes a free one")
        _check_seconds(data_expiration_seconds, store_timeout)
        if listener is not None and rank:
            raise InvalidConfig("listener", f"a socket on rank {rank}", "a socket on rank 0, None elsewhere")
        began = time.monotonic()
        if rank == 0:
            store, _, _ = open_store(host, port, store_timeout, listener)
        else:
            store = connect_store(host, port, store_timeout, abandoned)
        options: dict[str, Any] = {"data_expiration_seconds": data_expiration_seconds, "store_timeout": store_timeout}
        group = cls(store, 0, 0, "world", rank, range(world_size), abandoned, clock=clock, **options)
        group._owns_store = True
        try:
            group._gather("create", None, store_timeout, began)
        except BaseException:
            group._session.close()
            raise
        return group

    def close(self, timeout_s: float | None = None) -> None:
        """Leave the group; nothing can be called after it. A group on a store of the caller's leaves that alone.

        In a group of :meth:`create`, rank 0 waits for the others to leave before it closes the store under them. Raises
        StoreError, once the store is closed, that names the ranks that did not leave in time.
        """
        if self._closed:
            return
        self._closed = True
        session, call = self._session, self._call("close", timeout_s)
        try:
            if self._owns_store and self.rank == self.members[0]:
                keys = {member: self.key("left", 0, member) for member in self._others}
                session.run(call, lambda call: session.await_all(call, keys))
            elif self._owns_store:
                session.run(call, lambda _: session.set(self.key("left", 0, self.rank), b""))
        finally:
            session.close()

    def key(self, kind: str, seq: int, src: int, dst: int | str = "all") -> str:
        """The key under which ``src`` leaves the object of operation number ``seq`` for ``dst``."""
        return f"{self.name}/{kind}/{seq}/{src}/{dst}"

    def barrier(self, timeout_s: float = BARRIER_TIMEOUT_S) -> None:
        """Return when every member has called this. Raises StoreError that names the ranks that have not."""
        self._gather("barrier", None, timeout_s)

    def all_gather_obj(self, value: Any, timeout_s: float | None = None, as_type: Any = Any) -> list[Any]:
        """The objects of all members, in the order of ``members``, decoded as ``as_type``.

        Raises StoreError that names the ranks whose object did not come, ProtocolError for one that does not decode.
        """
        return [decode_object(raw, as_type) for raw in self._gather("gather", value, timeout_s)]

    def broadcast_obj(self, value: Any, src: int, timeout_s: float | None = None, as_type: Any = Any) -> Any:
        """``src``'s object, decoded as ``as_type`` (on ``src`` itself: ``value`` as it is). Errors as above.

        ``src`` does not wait for the others before it is ``outbox.MAX_UNREAD`` objects ahead of one of them.
        """
        self._check_member(src)
        seq = self._next()
        raw = encode_object(value) if src == self.rank else b""
        call, session, key = self._call(f"broadcast {seq}", timeout_s), self._session, self.key("broadcast", seq, src)
        if src == self.rank:
            self._expire(call)
            if self._broadcast.full:
                read = session.run(call, self._await_readers)
                session.doom(self._broadcast.drop_to(read))
                call.unseen = ()
            # Listed first: whether a write that fails has arrived is unknown.
            self._broadcast.add(seq, key, self._clock())
            session.run(call, lambda _: session.set(key, raw))
            return value

        def receive(call: Call) -> bytes:
            raw = session.await_one(call, key, src)
            session.set(self.key("read", 0, self.rank, src), encode_object(seq))
            return raw

        return decode_object(session.run(call, receive), as_type)

    def send_obj(self, value: Any, dst: int, timeout_s: float | None = None) -> None:
        """Leave an object for ``dst``. Does not wait for it to be read before ``dst`` is ``outbox.MAX_UNREAD`` behind;
        then raises StoreError that names ``dst``, with nothing sent, if that does not change in time.

        Deletes what has expired, see :meth:`expire_data`.
        """
        self._check_member(dst)
        raw = encode_object(value)
        call = self._call(f"send {self._pairs.next_to(dst)} to rank {dst}", timeout_s)
        self._expire(call)
        self._pairs.send(call, raw, dst)

    def recv_obj(self, src: int, as_type: Any = Any, timeout_s: float | None = None) -> Any:
        """The next object that ``src`` left for this rank, decoded as ``as_type``.

        Raises StoreError that names ``src`` when none comes in time; the same receive can be tried again. Where objects
        expired unread, StoreError says which, once, and the next receive goes on behind them. One that does not decode
        is ProtocolError, and gone.
        """
        self._check_member(src)
        call = self._call(f"receive {self._pairs.next_from(src)} from rank {src}", timeout_s)
        return decode_object(self._pairs.receive(call, src), as_type)

    def expire_data(self) -> None:
        """Delete what this member wrote and nobody fetched for ``data_expiration_seconds``. Every send and every
        broadcast of this member begins with it. Raises StoreError when the store does not answer."""
        call = self._call("expiry", None)
        self._expire(call)
        self._session.run(call, lambda _: None)

    def _expire(self, call: Call) -> None:
        before = self._clock() - self._data_expiration_s
        for lane in (self._gathered, self._broadcast):
            if due := lane.written_before(before):
                self._session.doom(lane.drop_to(due[-1].seq))
        self._pairs.expire(call, before)

    def _await_readers(self, call: Call) -> int:
        """The number of the last broadcast that all others have read; waits until that is the oldest of the lane."""
        oldest = self._broadcast.left[0].seq
        marks = dict.fromkeys(self._others, 0)
        call.lack = f"{len(self._broadcast.left)} broadcasts unread by"

        def look() -> bool | None:
            for member in [member for member, mark in marks.items() if mark < oldest]:
                if (raw := self._session.peek(self.key("read", 0, member, self.rank))) is not None:
                    marks[member] = int(decode_object(raw, int))
            call.unseen = tuple(member for member, mark in marks.items() if mark < oldest)
            return None if call.unseen else True

        if not poll(call, look):
            raise call.late()
        return min(marks.values(), default=self._broadcast.last)

    def _gather(self, kind: str, value: Any, timeout_s: float | None, began: float | None = None) -> list[bytes]:
        # Counted whatever comes of it, so that all members keep the same count.
        seq = self._next()
        raw = encode_object(value)
        call, session = self._call(f"{kind} {seq}", timeout_s, began), self._session
        keys = {member: self.key(kind, seq, member) for member in self.members}
        call.unseen = self._others
        if self._gathered.full:
            session.doom(self._gathered.drop_to(self._gathered.left[0].seq))

        def exchange(call: Call) -> list[bytes]:
            session.set(keys[self.rank], raw)
            session.await_all(call, {member: keys[member] for member in self._others})
            return session.get_all(keys.values()) if kind == "gather" else []

        old = [entry.key for lane in (self._gathered, self._broadcast) for entry in lane.left]
        self._gathered.add(seq, keys[self.rank], self._clock())
        # If it succeeds, all have begun this operation, so all have ended the ones before it.
        values = session.run(call, exchange, old)
        self._gathered.drop_to(seq - 1)
        self._broadcast.drop_to(seq - 1)
        return values

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _call(self, what: str, timeout_s: float | None, began: float | None = None) -> Call:
        return Call(f"{what} of {self.name}", self._store_timeout_s if timeout_s is None else timeout_s, began)

    def _check_member(self, rank: int) -> None:
        if rank not in self.members:
            raise ProtocolError(f"rank {rank} is not a member of {self.name}: {list(self.members)}")


def _check_seconds(data_expiration_seconds: float, store_timeout: float) -> None:
    for field, seconds in (("data_expiration_seconds", data_expiration_seconds), ("store_timeout", store_timeout)):
        if not seconds > 0:
            raise InvalidConfig(field, seconds, "a number of seconds above 0")
