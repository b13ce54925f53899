"""The event loop: submissions, steps, answers and mishaps on a virtual clock, in an order that the seed decides."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import msgspec

from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.outputs import ConnectionOutput
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import (
    Cancel,
    FromWorker,
    Rejected,
    Resume,
    Resumed,
    StepDone,
    Stop,
    ToWorker,
)
from tests.simulation.clients import Client, Clients, Stream
from tests.simulation.fleet import Fleet
from tests.simulation.invariants import check_at_rest, check_blocks, check_prefix_cache, check_rows, groups_of
from tests.simulation.scenario import CONNECTIONS, Plan, Scenario
from tests.simulation.step_rules import StepRules
from tests.simulation.worker import RuleBrokenError

MAX_EVENTS = 20_000

_TO_WORKER: Codec[Any] = Codec(ToWorker)
_FROM_WORKER: Codec[Any] = Codec(FromWorker)


class Simulation:
    """One scenario from its first submission to rest. :meth:`run` raises :class:`RuleBrokenError` at the first broken
    rule.

    ``seen`` counts what happened, so that a test can tell whether its scenarios meet what they are for.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.config = scenario.config
        self.now = 0.0
        self.seen: Counter[str] = Counter()
        self._random = random.Random(scenario.seed ^ 0x5EED)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.core = EngineCore(self.config, scenario.num_blocks, term=1, seed=scenario.seed)
        self.clients = Clients(self.config)
        self._groups = groups_of(self.core)
        self._per_group = self._groups[0].replicas
        self.fleet = Fleet(self.config, scenario.num_blocks, self._random)
        self._rules = StepRules(self.core, self.config, self.fleet.serving)
        self._closings = [0] * len(self._groups)
        self._joining: set[int] = set()
        self._answered: list[float] = [0.0] * len(scenario.num_blocks)
        self._last_done: dict[int, StepDone] = {}
        # Groups that the event at hand may have changed: all of them unless it says otherwise.
        self._touched: set[int] = set()
        self._confirmed: Counter[tuple[int, int]] = Counter()
        self._calls = 1000

    def run(self) -> None:
        for group in range(len(self._groups)):
            self._open_epoch(group, self.fleet.members(group))
        for plan in self.scenario.plans:
            self._at(plan.at, partial(self._submit, plan))
        for at, connection in self.scenario.drops:
            self._at(at, partial(self._drop, connection))
        for at in self.scenario.new_epochs:
            self._at(at, self._restart_all)
        for at, group in self.scenario.regroupings:
            self._at(at, partial(self._close_epoch, group % len(self._groups), 0.4))
        handled = 0
        while self._events:
            self.now, _, handle = heapq.heappop(self._events)
            self._touched = set(range(len(self._groups)))
            handle()
            self._after_event()
            handled += 1
            if handled > MAX_EVENTS:
                raise RuleBrokenError(f"no end after {MAX_EVENTS} events: something goes round in circles")
        self._check_end()

    # ---------------------------------------------------------------------------------------------------------- clock

    def _at(self, time: float, handle: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (time, self._order, handle))

    def _soon(self, mean: float, handle: Callable[[], None]) -> None:
        self._at(self.now + self._random.expovariate(1.0) * mean, handle)

    # ---------------------------------------------------------------------------------------------------------- clients

    def _submit(self, plan: Plan) -> None:
        self._rules.note_finished_waves()
        answer = self.core.submit(plan.connection, plan.submit, self.now)
        if isinstance(answer, Rejected):
            self.seen["rejected_" + (answer.error.field or answer.error.kind)] += 1
            return
        replica = self._replica_of(plan.submit.request_id)
        client = self.clients.accepted(plan, answer, self.scenario.num_blocks[replica])
        self._check_pin(plan, replica)
        if plan.cancel_at >= 0:
            self._at(max(plan.cancel_at, self.now), partial(self._cancel, client))
        if plan.resume_at >= 0:
            self._at(max(plan.resume_at, self.now), partial(self._resume, client))
        self._check_twice(plan)

    def _check_pin(self, plan: Plan, replica: int) -> None:
        pinned = plan.submit.data_parallel_rank
        size = self.config.attention_data_parallel_size
        wished = set(range(pinned * size, (pinned + 1) * size))
        if pinned >= 0 and replica not in wished and wished <= self.core.serving:
            raise RuleBrokenError(f"{plan.submit.request_id} went to replica {replica}, pinned to {pinned}")

    def _check_twice(self, plan: Plan) -> None:
        again = self.core.submit(plan.connection, plan.submit, self.now)
        if not isinstance(again, Rejected) or again.error.kind != "duplicate_request":
            raise RuleBrokenError(f"{plan.submit.request_id} was accepted twice")

    def _replica_of(self, request_id: str) -> int:
        request = self.core._book.register.by_id[request_id]
        return request.group * self._per_group + request.sequences[0].replica

    def _cancel(self, client: Client) -> None:
        if client.dropped:
            return
        self._calls += 1
        client.cancel_calls.add(self._calls)
        self.seen["cancel"] += 1
        self.core.cancel(client.connection, Cancel(self._calls, client.plan.submit.request_id), self.now)

    def _stop(self, client: Client, stream: Stream) -> None:
        if client.dropped or stream.end is not None:
            return
        stream.stopped_at = client.plan.stop_after
        self.seen["stop_string"] += 1
        request_id = client.plan.submit.request_id
        self.core.stop(client.connection, Stop(request_id, 0, stream.stopped_at))

    def _resume(self, client: Client) -> None:
        if client.dropped or client.forgotten:
            return
        connection = 1 + (client.connection - 1 + self._random.randrange(2)) % CONNECTIONS
        positions = tuple(stream.position if stream.end is None else 0 for stream in client.streams)
        answer = self.core.resume(connection, Resume(1, client.plan.submit.request_id, positions))
        if not isinstance(answer, Resumed):
            raise RuleBrokenError(f"{client.plan.submit.request_id}: not resumed, {answer.error.text}")
        self.seen["resume"] += 1
        self.clients.resumed(client, connection, answer)

    def _drop(self, connection: int) -> None:
        self.seen["drop"] += 1
        self.core.drop_connection(connection, self.now)
        for client in self.clients.requests.values():
            if client.connection == connection:
                client.dropped = True

    # ------------------------------------------------------------------------------------------------------------ steps

    def _restart_all(self) -> None:
        """All workers are new and know nothing; what the old ones still have to say is stale."""
        self.seen["new_epoch"] += 1
        for group in range(len(self._groups)):
            self._close_epoch(group, 1.0)

    def _close_epoch(self, group: int, chance_lost: float) -> None:
        """The epoch ends at once, each replica lost with that chance. It may end again before the next one is open."""
        lost = [replica for replica in self.fleet.members(group) if self._random.random() < chance_lost]
        self.seen["lost"] += len(lost)
        self.seen["kept"] += len(set(self.fleet.whole(group)) - set(lost))
        self._end_epoch(group, lost)
        self._soon(self.scenario.delay + 1.0, partial(self._reopen, group, self._closings[group]))
        if self._random.random() < 0.3:
            self._soon(1.0, partial(self._close_epoch, group, chance_lost))
            self.seen["closed_again"] += 1

    def _end_epoch(self, group: int, lost: list[int]) -> None:
        self._closings[group] += 1
        self._joining.discard(group)
        self.core.hold(group, False)
        self.fleet.close(group, lost)
        self.core.close_epoch(group, self._within_group(lost), self.now)

    def _reopen(self, group: int, closing: int) -> None:
        """Some replicas serve; the others join later."""
        if closing != self._closings[group] or self.fleet.serving[group]:
            return
        members = list(self.fleet.members(group))
        size = self.config.attention_data_parallel_size
        engines = len(members) // size
        some = self._random.sample(range(engines), self._random.randint(1, engines))
        serving = [replica for i, replica in enumerate(members) if i // size in some]
        self._open_epoch(group, serving)
        if len(serving) < len(members):
            self.seen["fewer_serve"] += 1
            self._soon(5.0, partial(self._begin_join, group, closing))

    def _open_epoch(self, group: int, serving: Collection[int]) -> None:
        epoch = self.fleet.epochs[group] + 1
        kept = self.fleet.open(group, epoch, serving)
        self.core.open_epoch(group, epoch, self._within_group(serving), self._within_group(kept))

    def _begin_join(self, group: int, closing: int) -> None:
        """No new steps; once those in flight are answered, everybody serves, and nothing is void."""
        if closing == self._closings[group]:
            self._joining.add(group)
            self.core.hold(group, True)

    def _join_what_is_drained(self) -> None:
        for group in list(self._joining):
            if self.core.in_flight(group) == 0:
                self.seen["join"] += 1
                self._end_epoch(group, [])
                self._open_epoch(group, self.fleet.members(group))

    def _within_group(self, replicas: Collection[int]) -> list[int]:
        return [replica % self._per_group for replica in replicas]

    def _plan(self) -> None:
        while planned := self.core.plan(self.now):
            self._rules.check(planned)
            self.seen["steps"] += 1
            self.seen[f"lane_{planned[0][1].lane}"] += 1
            self.seen["dummy_steps"] += planned[0][1].num_tokens_across_dp.tolist().count(0)
            for replica, step in planned:
                message = step
                if self.scenario.through_codec:
                    message = _TO_WORKER.decode([bytes(frame) for frame in _TO_WORKER.encode(step)])
                self.fleet.inbox[replica].append(message)
            self._start(planned[0][0] // self._per_group)
        if self._random.random() < 0.9:
            self.core.maintain(self.now)

    def _start(self, group: int) -> None:
        if self.fleet.may_start(group):
            self.fleet.running.add(group)
            self._soon(self.scenario.step_time, partial(self._finish_step, group, self._closings[group]))

    def _finish_step(self, group: int, closing: int) -> None:
        self._touched.clear()  # what happens between workers is nothing to the core
        if closing != self._closings[group]:
            return
        self.fleet.running.discard(group)
        for replica in self.fleet.serving[group]:
            worker = self.fleet.workers[replica]
            assert worker is not None
            done = worker.execute(self.fleet.inbox[replica].popleft())
            if self.scenario.through_codec:
                done = _FROM_WORKER.decode([bytes(frame) for frame in _FROM_WORKER.encode(done)])
            # One connection per rank: its answers arrive in order, those of different ranks in any.
            delay = self._random.expovariate(1.0) * self.scenario.delay
            at = self._answered[replica] = max(self._answered[replica], self.now + delay)
            self._at(at, partial(self._answer, replica, done))
        self._start(group)

    def _answer(self, replica: int, done: StepDone) -> None:
        self._touched = {replica // self._per_group}
        group = replica // self._per_group
        if done.epoch != self.fleet.epochs[group] or not self.fleet.serving[group]:
            self._refused(replica, done, "stale")
            return
        if self._random.random() < self.scenario.chance_duplicate:
            self._refused_answers(replica, done)
        self.core.apply(replica, done, self.now)
        self._last_done[replica] = done

    def _refused_answers(self, replica: int, done: StepDone) -> None:
        before = self._last_done.get(replica)
        if before is not None:
            self._refused(replica, before, "duplicate")
        self._refused(replica, msgspec.structs.replace(done, step=done.step + 1), "early")
        self._refused(replica, msgspec.structs.replace(done, epoch=done.epoch - 1), "stale")
        if len(done.tokens):
            short = msgspec.structs.replace(done, tokens=done.tokens[1:], logprob_index=done.tokens[:0], logprobs=())
            self._refused(replica, short, "short")

    def _refused(self, replica: int, done: StepDone, kind: str) -> None:
        try:
            self.core.apply(replica, done, self.now)
        except ProtocolError:
            self.seen["refused_" + kind] += 1
        else:
            raise RuleBrokenError(f"a {kind} answer to step {done.step} was taken")

    # ------------------------------------------------------------------------------------------------------- invariants

    def _after_event(self) -> None:
        if not self._touched:
            return
        steps = [group.steps for group in self._groups]
        self._join_what_is_drained()
        self._plan()
        for index in self._touched:
            group = self._groups[index]
            if group.steps != steps[index] and not group.unfinished:
                raise RuleBrokenError(f"group {index}: a step without work")
            check_blocks(group)
            check_rows(group)
            if self._random.random() < 0.1:
                check_prefix_cache(group)
        self._rules.note_finished_waves()
        for output in self._take_outputs():
            for client, stream in self.clients.read(output):
                wanted = client.plan.stop_after
                if wanted and stream is client.streams[0] and stream.position >= wanted and stream.stopped_at < 0:
                    stream.stopped_at = 0
                    self._soon(self.scenario.delay, partial(self._stop, client, stream))
            self._confirm(output.connection, output.cancelled)
            for end in output.ends:
                self.seen["end_" + end.reason] += 1
                self._forget(end.request_id)

    def _take_outputs(self) -> list[ConnectionOutput]:
        return self.core.outputs()

    def _confirm(self, connection: int, cancelled: list[tuple[int, str]]) -> None:
        for call_id, request_id in cancelled:
            client = self.clients.requests[request_id]
            self._confirmed[connection, call_id] += 1
            if not client.ended:
                raise RuleBrokenError(f"{request_id}: cancel confirmed before its streams ended")
            if client.forgotten:  # its id means nothing to the core any more, so there is nothing to wait for
                continue
            for group in self._groups:
                for row, sequence in enumerate(group.table.sequences):
                    if sequence is not None and sequence.request.request_id == request_id:
                        raise RuleBrokenError(f"{request_id}: cancel confirmed while row {row} is held")

    def _forget(self, request_id: str) -> None:
        client = self.clients.requests[request_id]
        if client.ended and self._random.random() < 0.5:
            self.core.forget(request_id)
            client.forgotten = request_id not in self.core._book.register.by_id
        elif client.ended and not client.dropped:
            self._soon(1.0, partial(self._resume, client))

    def _check_end(self) -> None:
        for client in self.clients.requests.values():
            if not client.ended:
                raise RuleBrokenError(f"{client.plan.submit.request_id} never ended: {client.streams}")
            for call_id in client.cancel_calls:
                count = sum(n for (_, call), n in self._confirmed.items() if call == call_id)
                if count != 1 and not client.dropped:
                    raise RuleBrokenError(
                        f"{client.plan.submit.request_id}: cancel {call_id} was confirmed {count} times"
                    )
        check_at_rest(self.core)
        for replica, worker in enumerate(self.fleet.workers):
            group = self._groups[replica // self._per_group]
            if worker is None or worker.next_step != group.next_step:
                raise RuleBrokenError(f"replica {replica} does not stand at step {group.next_step} of its group")
        self._rules.check_gather_counts()
        self.seen.update({f"core_{name}": count for name, count in self.core.counters().items()})


def run_scenario(scenario: Scenario) -> Counter[str]:
    """Runs to the end. A :class:`RuleBrokenError`, or whatever the core raised, names the seed that replays it."""
    simulation = Simulation(scenario)
    try:
        simulation.run()
    except Exception as error:
        replay = f"python -m tests.simulation.soak --seed {scenario.seed}"
        raise RuleBrokenError(f"seed {scenario.seed} at {simulation.now:.3f}s: {error!r}\nreplay: {replay}") from error
    return simulation.seen
