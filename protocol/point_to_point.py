"""Objects from one member of a group to another, through the store.

Sender and receiver number the objects of their pair by themselves. The receiver deletes what it has read; a key that is
gone tells the sender that it may go on. What expired unread leaves a floor behind, one key per pair, that tells the
receiver where to go on.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from drumline.protocol.bounded import Call, StoreError, poll
from drumline.protocol.objects import decode_object, encode_object
from drumline.protocol.outbox import Lane, Left
from drumline.protocol.store_session import StoreSession


class PointToPoint:
    """What one member has sent to, and received from, each other member."""

    def __init__(
        self, session: StoreSession, rank: int, key: Callable[[str, int, int, int], str], clock: Callable[[], float]
    ) -> None:
        """``key`` makes a key of kind, number, source and destination."""
        self._session = session
        self._rank = rank
        self._key = key
        self._clock = clock
        self._sent: dict[int, Lane] = {}
        self._received: dict[int, int] = {}

    def next_to(self, dst: int) -> int:
        """The number of the next object for ``dst``."""
        return self._lane(dst).last + 1

    def next_from(self, src: int) -> int:
        """The number of the next object from ``src``."""
        return self._received.get(src, 0) + 1

    def send(self, call: Call, raw: bytes, dst: int) -> None:
        """Leave ``raw`` for ``dst``; raises StoreError, with nothing sent, when ``dst`` stays too far behind."""
        lane, session = self._lane(dst), self._session
        if lane.full:
            lane.drop_to(session.run(call, lambda call: self._await_reader(call, lane, dst)))
            call.unseen = ()
        seq = lane.last + 1
        key = self._key("send", seq, self._rank, dst)
        # Listed first: whether a write that fails has arrived is unknown, and what may be there must go in the end.
        lane.add(seq, key, self._clock())
        session.run(call, lambda _: session.set(key, raw))

    def receive(self, call: Call, src: int) -> bytes:
        """The next object from ``src``; raises StoreError when it does not come, or when it expired, and then goes on
        with the first that did not."""
        seq, session = self.next_from(src), self._session
        key, floor = self._key("send", seq, src, self._rank), self._key("floor", 0, src, self._rank)
        call.unseen = (src,)

        def look() -> tuple[bytes, int] | None:
            """The object and its number or, where the sender has given up, nothing and the number to go on with."""
            if (raw := session.peek(key)) is not None:
                return raw, seq
            mark = session.peek(floor)
            first = seq if mark is None else int(decode_object(mark, int))
            return (b"", first) if first > seq else None

        def ask(call: Call) -> tuple[bytes, int]:
            if (found := poll(call, look)) is None:
                raise call.late()
            return found

        raw, number = session.run(call, ask, (key,))
        if number > seq:
            self._received[src] = number - 1
            raise StoreError(f"{call.what}: numbers {seq} to {number - 1} expired unread")
        self._received[src] = seq
        return raw

    def expire(self, call: Call, before: float) -> None:
        """Give up what was written before ``before`` and is still unread; deletes it with the next operation."""
        for dst, lane in self._sent.items():
            if due := lane.written_before(before):
                self._session.run(call, lambda _, dst=dst, due=due: self._raise_floor(dst, due))  # type: ignore[misc]
                self._session.doom(lane.drop_to(due[-1].seq))

    def _raise_floor(self, dst: int, due: Sequence[Left]) -> None:
        """Tell ``dst`` where to go on, unless it has read all of ``due``."""
        unread = [entry.seq for entry in due if self._session.holds(entry.key)]
        if unread:
            self._session.set(self._key("floor", 0, self._rank, dst), encode_object(unread[-1] + 1))

    def _await_reader(self, call: Call, lane: Lane, dst: int) -> int:
        """The number of the last object of a full lane that ``dst`` has read; waits until it has read one."""
        left = list(lane.left)
        call.unseen, call.lack = (dst,), f"{len(left)} objects unread by"
        if not poll(call, lambda: None if self._session.holds(left[0].key) else True):
            raise call.late()
        # It reads in order, so what is gone is the beginning.
        gone = bisect.bisect_left(left, True, key=lambda entry: self._session.holds(entry.key))
        return left[gone - 1].seq

    def _lane(self, dst: int) -> Lane:
        return self._sent.setdefault(dst, Lane())
