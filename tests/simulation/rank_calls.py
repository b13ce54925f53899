"""Random control calls of several clients against ranks that answer late, fail, die and come back.

``python -m tests.simulation.rank_calls --minutes 5`` runs seed after seed; ``--seed N`` replays one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, deque

import msgspec

from drumline.engine.calls import MAX_UNANSWERED, OpenCall, RankCalls
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Call, CallRanks, CallResult, RankAnswer

TERM = 3
RANKS = 3
CLIENTS = 3
METHODS = ("double", "fail")


class MismatchError(AssertionError):
    """A call came to something that is not its own."""


class SimulatedRank:
    """Runs its calls in order, answers in order; ``alive`` and ``epoch`` change when it dies and comes back."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.epoch = 1
        self.alive = True
        self.inbox: deque[Call] = deque()
        self.outbox: deque[CallResult] = deque()

    def run_one(self) -> None:
        call = self.inbox.popleft()
        nonce = msgspec.msgpack.decode(call.args, type=int)
        value, error = b"", None
        if call.method == "fail" and nonce % RANKS == self.rank:
            error = ErrorInfo(kind="remote_error", text=f"ValueError: {nonce} on {self.rank}", rank=self.rank)
        else:
            value = msgspec.msgpack.encode((call.method, nonce, self.rank))
        self.outbox.append(CallResult(call.term, call.epoch, call.call_id, self.rank, error is None, value, error))

    def die(self) -> None:
        self.alive = False
        self.inbox.clear()

    def come_back(self) -> None:
        self.alive = True
        self.epoch += 1


class RandomCalls:
    """One run. Every client call carries a nonce that no other has; all that comes back is held against it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calls = RankCalls(TERM)
        self.ranks = [SimulatedRank(rank) for rank in range(RANKS)]
        self.connections = list(range(CLIENTS))
        self.next_connection = CLIENTS
        self.next_nonce = 0
        self.next_call_id: Counter[int] = Counter()
        self.waiting: dict[tuple[int, int], tuple[str, int, tuple[int, ...]]] = {}
        self.now = 0.0
        self.seen: Counter[str] = Counter()

    def run(self, calls: int) -> Counter[str]:
        """Until ``calls`` were made and all of them came to something. Returns what happened how often."""
        actions = (
            self.open, self.work, self.deliver, self.forge, self.pass_time, self.change_client, self.kill, self.revive,
        )  # fmt: skip
        weights = (30, 110, 110, 3, 10, 0.3, 0.3, 2)
        while self.seen["calls"] < calls:
            for action in self.random.choices(actions, weights, k=64):
                action()
        self.settle()
        return self.seen

    def open(self) -> None:
        connection = self.random.choice(self.connections)
        method, nonce = self.random.choice(METHODS), self.next_nonce
        self.next_nonce += 1
        call_id = self.next_call_id[connection] = self.next_call_id[connection] + 1
        epochs = {one.rank: one.epoch for one in self.ranks if one.alive}
        timeout_s = self.random.choice((0.5, 2.0, 20.0))
        opened = self.calls.open(
            connection, CallRanks(call_id, method, msgspec.msgpack.encode(nonce), timeout_s), epochs, self.now
        )
        if isinstance(opened, ErrorInfo):
            self.seen["refused"] += 1
            if self.calls.owed(opened.rank) < MAX_UNANSWERED:
                raise MismatchError(f"refused for rank {opened.rank}, which owes {self.calls.owed(opened.rank)}")
            return
        self.seen["calls"] += 1
        call, sends = opened
        self.waiting[connection, call_id] = (method, nonce, tuple(epochs))
        for rank, one in sends:
            self.ranks[rank].inbox.append(one)
        if not sends:
            self.complete(call)

    def work(self) -> None:
        rank = self.random.choice(self.ranks)
        if rank.inbox:
            rank.run_one()

    def deliver(self) -> None:
        rank = self.random.choice(self.ranks)
        if rank.outbox:
            self.take(rank.outbox.popleft())

    def forge(self) -> None:
        """An answer by the wrong rank, or one that is given twice."""
        rank = self.random.choice(self.ranks)
        if rank.outbox:
            answer = rank.outbox[0]
            self.seen["forged"] += 1
            if self.random.random() < 0.5:
                answer = msgspec.structs.replace(answer, rank=(answer.rank + 1) % RANKS)
                if self.calls.answer(answer) is not None:
                    raise MismatchError("a rank's answer was taken for another's")
            else:
                rank.outbox.append(answer)

    def pass_time(self) -> None:
        self.now += self.random.expovariate(1 / 0.4)
        for call in self.calls.expire(self.now):
            self.seen["timed out"] += 1
            self.complete(call)

    def change_client(self) -> None:
        """A client leaves, and another comes in its place, whose call ids begin anew."""
        place = self.random.randrange(CLIENTS)
        left = self.connections[place]
        self.calls.drop_connection(left)
        self.connections[place] = self.next_connection
        self.next_connection += 1
        for key in [key for key in self.waiting if key[0] == left]:
            del self.waiting[key]
            self.seen["abandoned"] += 1

    def revive(self) -> None:
        for rank in self.ranks:
            if not rank.alive:
                rank.come_back()

    def kill(self) -> None:
        rank = self.random.choice(self.ranks)
        if not rank.alive:
            return
        rank.die()
        self.seen["deaths"] += 1
        for call in self.calls.unreachable(rank.rank, f"rank {rank.rank} is gone"):
            self.complete(call)

    def take(self, answer: CallResult) -> None:
        done = self.calls.answer(answer)
        if done is not None:
            self.complete(done)

    def complete(self, call: OpenCall) -> None:
        """Hold what a call came to against what was asked."""
        result = call.result()
        asked = self.waiting.pop((call.connection, result.call_id), None)
        if asked is None:
            raise MismatchError(f"an answer for call {result.call_id} of {call.connection}, which waits for none")
        method, nonce, ranks = asked
        if tuple(answer.rank for answer in result.answers) != ranks:
            raise MismatchError(f"asked {ranks}, answered {[answer.rank for answer in result.answers]}")
        for answer in result.answers:
            self.check(answer, method, nonce)

    def check(self, answer: RankAnswer, method: str, nonce: int) -> None:
        fails = method == "fail" and nonce % RANKS == answer.rank
        if answer.ok:
            self.seen["values"] += 1
            if fails or msgspec.msgpack.decode(answer.value) != [method, nonce, answer.rank]:
                raise MismatchError(f"{method} {nonce} on {answer.rank} came to {answer.value!r}")
            return
        error = answer.error
        if error is None or error.rank != answer.rank:
            raise MismatchError(f"an error of rank {answer.rank} that says {error}")
        if error.kind == "remote_error":
            self.seen["errors"] += 1
            if not fails or error.text != f"ValueError: {nonce} on {answer.rank}":
                raise MismatchError(f"{method} {nonce} on {answer.rank} failed with {error.text}")
        elif "did not answer" not in error.text and "is gone" not in error.text:
            raise MismatchError(error.text)

    def settle(self) -> None:
        """Everything is answered, given up or abandoned, and nothing is kept."""
        for rank in self.ranks:
            while rank.inbox:
                rank.run_one()
            while rank.outbox:
                self.take(rank.outbox.popleft())
        for call in self.calls.expire(self.now + 100.0):
            self.complete(call)
        kept = [len(self.waiting), len(self.calls), *(self.calls.owed(rank.rank) for rank in self.ranks)]
        if any(kept) or self.calls.next_deadline is not None:
            raise MismatchError(f"left over: {kept}")
        self.seen["late"] = self.calls.late_replies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="run this one and stop")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 40) if arguments.seed is None else arguments.seed
    end = time.monotonic() + (60 * arguments.minutes if arguments.seed is None else 0)
    seen: Counter[str] = Counter()
    while True:
        try:
            seen.update(RandomCalls(seed).run(20_000))
        except MismatchError:
            print(json.dumps({"failed_seed": seed}))
            raise
        if time.monotonic() >= end:
            print(json.dumps({"last_seed": seed, "seen": seen}))
            return 0
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
