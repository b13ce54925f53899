"""The reading half of a client: every message of the engine, held against what it was asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from drumline.protocol.messages import (
    Accepted,
    Ack,
    Behind,
    Cancelled,
    Failed,
    Finished,
    FromClient,
    Rejected,
    Resumed,
    Stop,
    ToClient,
    Tokens,
    WelcomeClient,
)
from tests.simulation.cluster.streams import Asked
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster

ACK_EVERY = 4
ROOM = 6
"""Messages that fit the socket of a client that does not read."""
RETRY_S = 0.3


class ClientReader:
    """``asked``: requests by id. ``reads_from``: until then nothing is read. What is to be said, a subclass says."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.clock = cluster.clock
        self.number = number
        self.asked: dict[str, Asked] = {}
        self.ready = False
        self.knows_all = True
        self.term = 0
        self.reads_from = 0.0
        self.unread: deque[ToClient] = deque()
        self._frames = 0
        self._handles: dict[int, tuple[Asked, int]] = {}
        self._readers: dict[type, Callable[..., None]] = {
            WelcomeClient: self._welcome,
            Tokens: self._tokens,
            Finished: self._finished,
            Accepted: self._accepted,
            Resumed: self._resumed,
            Rejected: self._rejected,
            Cancelled: self._cancelled,
            Failed: self._failed,
            Behind: self._behind,
        }

    def send(self, message: FromClient) -> None:
        """To the coordinator, if there is one."""
        raise AssertionError(message)

    def submit(self, asked: Asked) -> None:
        """Submit a request."""
        raise AssertionError(asked)

    def resume(self, asked: Asked) -> None:
        """Ask for what is missing of a request."""
        raise AssertionError(asked)

    def come_back(self) -> None:
        """The engine is ready: say again all that it may not know."""
        raise AssertionError("nothing to say")

    def forget_connection(self) -> None:
        """Frames and handles are those of a new connection from here on."""
        self._frames = 0
        self._handles.clear()
        self.unread.clear()

    def pause(self, seconds: float) -> None:
        """Read nothing for so long."""
        self.reads_from = self.clock.now + seconds
        self.clock.seen["slow_client"] += 1
        self.clock.after(seconds, self._read_all)

    @property
    def is_full(self) -> bool:
        """Whether nothing more fits the socket."""
        return len(self.unread) >= ROOM

    def receive(self, message: ToClient) -> None:
        """A message comes to the socket."""
        self.unread.append(message)
        self._read_all()

    def _read_all(self) -> None:
        while self.unread and self.clock.now >= self.reads_from:
            self._read(self.unread.popleft())

    def _read(self, message: ToClient) -> None:
        if self.clock.verbose:
            self.clock.note(f"client {self.number} reads {message}")
        read = self._readers.get(type(message))
        if read is not None:
            read(message)

    def _behind(self, message: Behind) -> None:
        self.clock.seen["behind"] += 1
        for asked in self.asked.values():
            if asked.accepted and not asked.over:
                self.resume(asked)

    def _welcome(self, message: WelcomeClient) -> None:
        if message.term < self.term:
            raise RuleBrokenError(f"client {self.number} of term {self.term} is welcomed to term {message.term}")
        self.term = message.term
        self.knows_all = message.knows_all
        self.ready = True
        self.come_back()

    def _accepted(self, message: Accepted) -> None:
        asked = self.asked[message.request_id]
        if asked.call_id != message.call_id:
            return
        again = asked.ever_accepted
        shape = self.cluster.shape
        asked.accept(shape.core, message.seed, shape.num_blocks)
        self._register(asked, message.handles.tolist())
        self.cluster.rules.accepted(asked)
        if again or asked.sent > 1:
            # It may have gone on while its acceptance was lost.
            self.resume(asked)

    def _register(self, asked: Asked, handles: list[int]) -> None:
        for index, handle in enumerate(handles):
            known = self._handles.setdefault(handle, (asked, index))
            if known[0] is not asked or known[1] != index:
                asked.broken(f"handle {handle} is that of {known[0].request_id}/{known[1]}")

    def _tokens(self, message: Tokens) -> None:
        self._frame(message.frame)
        entries = dict(zip(message.logprob_index.tolist(), message.logprobs, strict=True))
        columns = (message.handles.tolist(), message.positions.tolist(), message.tokens.tolist())
        gaps: set[str] = set()
        for i, (handle, position, token) in enumerate(zip(*columns, strict=True)):
            found = self._handles.get(handle)
            if found is None:
                raise RuleBrokenError(f"client {self.number} knows no stream {handle}")
            asked, index = found
            if asked.over:
                continue
            asked.heard(self.clock.now)
            if asked.token(index, position, token, entries.get(i)):
                gaps.add(asked.request_id)
            elif index == 0:
                self._look_for_stop(asked)
        for request_id in gaps:
            self._gap(self.asked[request_id])

    def _gap(self, asked: Asked) -> None:
        """Tokens are missing: ask for them."""
        self.clock.seen["gap"] += 1
        self.resume(asked)

    def _look_for_stop(self, asked: Asked) -> None:
        stream, wanted = asked.streams[0], asked.wanted.stop_after
        if wanted and stream.stopped_at < 0 and len(stream.tokens) >= wanted and stream.end is None:
            stream.stopped_at = wanted
            self.clock.seen["stop_string"] += 1
            self.send(Stop(asked.request_id, 0, wanted))

    def _finished(self, message: Finished) -> None:
        self._frame(message.frame)
        for end in message.ends:
            found = self._handles.get(end.handle)
            if found is None:
                raise RuleBrokenError(f"client {self.number} knows no stream {end.handle}")
            if found[0].over and not found[0].ended:
                continue
            if found[0].ends(end):
                self._gap(found[0])
            elif found[0].ended:
                self.clock.seen["end_" + end.reason] += 1

    def _frame(self, frame: int) -> None:
        if frame <= self._frames:
            raise RuleBrokenError(f"client {self.number}: frame {frame} after {self._frames}")
        self._frames = frame
        if frame % ACK_EVERY == 0:
            self.send(Ack(frame))
        else:
            self.clock.soon(0.05, self._ack_all)

    def _ack_all(self) -> None:
        if self._frames:
            self.send(Ack(self._frames))

    def _resumed(self, message: Resumed) -> None:
        asked = self.asked[message.request_id]
        self._register(asked, message.handles.tolist())
        if asked.over:
            return
        asked.accepted = True
        entries = [len(one) for one in message.logprobs]
        asked.resumed([tokens.tolist() for tokens in message.tokens], entries, message.ends)
        self._look_for_stop(asked)
        if asked.streams[0].stopped_at > 0 and all(end.index for end in message.ends):
            self.send(Stop(asked.request_id, 0, asked.streams[0].stopped_at))

    def _rejected(self, message: Rejected) -> None:
        asked = self.asked[message.request_id]
        if asked.over:
            return
        self.clock.seen["rejected_" + message.error.kind] += 1
        if message.call_id == asked.call_id and not asked.ever_accepted:
            if message.error.retryable:
                self.clock.after(RETRY_S, partial(self._try_again, asked))
                return
            asked.rejected = True
        elif asked.cancel_calls:
            # It has ended, and its end was in a frame that this connection did not get.
            self.clock.seen["resume_of_cancelled"] += 1
        else:
            self.cluster.rules.resume_rejected(asked, message.error)

    def _try_again(self, asked: Asked) -> None:
        if self.ready and not asked.over and not asked.ever_accepted:
            self.submit(asked)

    def _cancelled(self, message: Cancelled) -> None:
        asked = self.asked[message.request_id]
        if message.call_id not in asked.cancel_calls:
            asked.broken(f"cancel {message.call_id} is confirmed, asked for {asked.cancel_calls}")
        asked.cancelled = True
        if not asked.ended:
            # Its end was left out, or it was never taken in.
            asked.lost = True

    def _failed(self, message: Failed) -> None:
        if not message.request_id:
            for asked in self.asked.values():
                if not asked.over:
                    asked.failed = message.error
            return
        asked = self.asked[message.request_id]
        if not asked.over:
            asked.failed = message.error
            self.cluster.rules.request_failed(asked, message.error)
