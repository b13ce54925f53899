"""The same days, harsher: the core is replaced by one with a journal's knowledge, suspects run apart, clients come back
after their connection was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import msgspec
import numpy as np

from drumline.engine.core.batch_table import DRAIN, FREE
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.core.restored import RestoredRequest
from drumline.protocol.messages import Accepted, Cancel, Resume, Resumed, Stop
from tests.simulation.clients import Client, Stream
from tests.simulation.invariants import groups_of
from tests.simulation.journal_model import JournalModel
from tests.simulation.scenario import CONNECTIONS, Plan, Scenario
from tests.simulation.simulation import Simulation
from tests.simulation.step_rules import StepRules
from tests.simulation.worker import RuleBrokenError

WINDOW = 1000.0


class HarshSimulation(Simulation):
    """Every request is durable and has a nonce. ``forgetful``: chance that a takeover has lost a request or its newest
    tokens, which clients then bring back."""

    def __init__(self, scenario: Scenario, forgetful: float) -> None:
        config = msgspec.structs.replace(scenario.config, resume_window_s=WINDOW)
        scenario.config = config
        # A takeover does not know which replica had bounded a request: let all be of one size.
        scenario.num_blocks = [min(scenario.num_blocks)] * len(scenario.num_blocks)
        for plan in scenario.plans:
            submit = plan.submit
            plan.submit = msgspec.structs.replace(submit, durable=True, nonce=f"nonce of {submit.request_id}")
        super().__init__(scenario)
        self._journal = JournalModel()
        self._forgetful = forgetful
        self._number_of = list(range(1, CONNECTIONS + 1))
        self._connected = CONNECTIONS
        self._dead: set[int] = set()
        self._away: set[str] = set()
        self._cancelled_on: dict[str, int] = {}
        self._confined: tuple[set[str], set[str], int] | None = None
        for mishap, most in ((self._take_over, 2), (self._confine, 2)):
            for _ in range(self._random.randint(0, most)):
                self._at(self._random.uniform(0, 30), mishap)

    # ------------------------------------------------------------------------------------------------------ confinement

    def _confine(self) -> None:
        live = [request_id for request_id, client in self.clients.requests.items() if not client.ended]
        serving = sorted(self.core.serving)
        if not live or not serving:
            return
        if self._confined is not None:
            return
        self._random.shuffle(live)
        active, held = live[: len(live) // 2 + 1], live[len(live) // 2 + 1 :][:2]
        self._confined = set(active), set(held), self._random.choice(serving)
        self.core.confine(active, held, self._confined[2])
        self.seen["confined"] += 1
        self._soon(5.0, self._set_free)

    def _set_free(self) -> None:
        self._confined = None
        self.core.confine((), (), None)

    def _check_confinement(self) -> None:
        if self._confined is None:
            return
        active, held, alone = self._confined
        for index, group in enumerate(self._groups):
            table = group.table
            for row in np.flatnonzero((table.status != FREE) & (table.status <= DRAIN)).tolist():
                one = table.sequences[row]
                assert one is not None
                replica = index * self._per_group + row // table.rows_per_replica
                longest = max(sequence.max_length for sequence in one.request.live)
                fits = longest <= self.scenario.num_blocks[alone] * self.config.block_size + 1
                name = one.request.request_id
                if name in held or (name in active and fits) != (replica == alone):
                    raise RuleBrokenError(f"{name} runs on {replica}; apart on {alone}: {active}, held: {held}")

    # -------------------------------------------------------------------------------------------------------- clients

    def _submit(self, plan: Plan) -> None:
        plan.connection = self._number_of[plan.connection - 1]
        super()._submit(plan)

    def _check_pin(self, plan: Plan, replica: int) -> None:
        if self._confined is None:
            super()._check_pin(plan, replica)

    def _check_twice(self, plan: Plan) -> None:
        """The same submission is answered again, under new handles; another one with the id is refused."""
        super()._check_twice(Plan(msgspec.structs.replace(plan.submit, nonce="another"), plan.connection, plan.at))
        if self._random.random() < 0.3:
            answer = self.core.submit(plan.connection, plan.submit, self.now)
            if not isinstance(answer, Accepted):
                raise RuleBrokenError(f"{plan.submit.request_id} is not known by its nonce")
            self.clients.rehandled(self.clients.requests[plan.submit.request_id], answer.handles.tolist())
            self.seen["accepted_again"] += 1

    def _drop(self, connection: int) -> None:
        self.seen["drop"] += 1
        number = self._number_of[connection - 1]
        self._hang_up(connection - 1)
        self.core.drop_connection(number, self.now)
        clients = self.clients.requests.items()
        self._lose([one for name, one in clients if number in (one.connection, self._cancelled_on.get(name))])

    def _hang_up(self, which: int) -> None:
        self._dead.add(self._number_of[which])
        self._connected += 1
        self._number_of[which] = self._connected

    def _lose(self, clients: Iterable[Client]) -> None:
        for client in clients:
            self._away.add(client.plan.submit.request_id)
            self._soon(3.0, partial(self._come_back, client))

    def _resume(self, client: Client) -> None:
        if client.plan.submit.request_id not in self._away and not client.forgotten:
            self._go_on(client, self._random.choice(self._number_of))

    def _cancel(self, client: Client) -> None:
        self._once_back(client, self._send_cancel, client)

    def _send_cancel(self, client: Client) -> None:
        self._cancelled_on[client.plan.submit.request_id] = client.connection
        super()._cancel(client)

    def _stop(self, client: Client, stream: Stream) -> None:
        self._once_back(client, super()._stop, client, stream)

    def _once_back(self, client: Client, act: Callable[..., None], *more: Client | Stream) -> None:
        if client.plan.submit.request_id in self._away:
            self._soon(3.0, partial(self._once_back, client, act, *more))
        elif not client.forgotten:
            act(*more)

    def _come_back(self, client: Client) -> None:
        """Goes on where it stands, and sends again what was not confirmed."""
        request_id = client.plan.submit.request_id
        if request_id not in self._away:
            return
        self._away.discard(request_id)
        connection = self._random.choice(self._number_of)
        if not client.forgotten:
            self._go_on(client, connection)
        for call_id in client.cancel_calls if self._cancelled_on.get(request_id) in self._dead else ():
            if not sum(n for (_, call), n in self._confirmed.items() if call == call_id):
                self._cancelled_on[request_id] = connection
                self.core.cancel(connection, Cancel(call_id, request_id), self.now)

    def _go_on(self, client: Client, connection: int) -> None:
        request_id = client.plan.submit.request_id
        if client.ended and request_id not in self.core._book.register.by_id:
            client.forgotten = True
            return
        positions = tuple(0 if stream.end is not None else stream.position for stream in client.streams)
        read = (stream.position if stream.end is None else stream.end.num_tokens for stream in client.streams)
        tokens = tuple(
            np.asarray(stream.expected.tokens[:count], dtype=np.int32)
            for stream, count in zip(client.streams, read, strict=True)
        )
        seeded = msgspec.structs.replace(client.plan.submit.sampling, seed=client.seed)
        submit = msgspec.structs.replace(client.plan.submit, sampling=seeded, seed_given=True)
        answer = self.core.adopt(connection, Resume(1, request_id, positions, tokens, submit), self.now)
        if not isinstance(answer, Resumed):
            raise RuleBrokenError(f"{request_id}: did not come back, {answer.error.text}")
        self.seen["came_back"] += 1
        client.plan.resume_at = self.now
        for end in answer.ends:
            stream = client.streams[end.index]
            if stream.end is None and end.stop_token < 0 and end.reason != "length":
                stream.position = min(stream.position, end.num_tokens)
        self.clients.resumed(client, connection, answer)
        self.clients.told_ends(client, answer)
        ended = {end.index for end in answer.ends}
        for index, stream in enumerate(client.streams):
            if stream.end is not None and index not in ended:
                # This core does not know that the client had found a stop string.
                stream.end_told_twice = True
                self.core.stop(connection, Stop(request_id, index, stream.end.num_tokens))

    # ------------------------------------------------------------------------------------------------------- takeover

    def _take_over(self) -> None:
        """Another core goes on with what the journal knows and clients bring. Workers have their weights, and nothing
        else is trusted."""
        self.seen["takeover"] += 1
        known = self._journal.requests()
        kept = [one for one in known if self._random.random() >= self._forgetful]
        self.seen["forgotten_by_journal"] += len(known) - len(kept)
        kept = [self._without_newest(one) if self._random.random() < self._forgetful else one for one in kept]
        self.core = EngineCore(self.config, self.scenario.num_blocks, term=1, seed=self.seen["takeover"])
        self._groups = groups_of(self.core)
        self._rules = StepRules(self.core, self.config, self.fleet.serving)
        self._last_done.clear()
        self._joining.clear()
        self._confined = None
        self._journal = JournalModel(kept)
        self.core.restore(kept, self.now)
        for which in range(CONNECTIONS):
            self._hang_up(which)
        self._dead.update(range(1, self._connected + 1 - CONNECTIONS))
        for group in range(len(self._groups)):
            self._closings[group] += 1
            self.fleet.close(group, self.fleet.members(group))
            self._soon(1.0, partial(self._reopen, group, self._closings[group]))
        self._lose(self.clients.requests.values())

    def _without_newest(self, one: RestoredRequest) -> RestoredRequest:
        """What a journal knows that missed the last tokens of a request, and how it ended."""
        if any(stream.end is not None for stream in self.clients.requests[one.submit.request_id].streams):
            return one  # a client asks no more for what it saw end
        counts = [self._random.randint(0, len(own)) for own in one.tokens]
        self.seen["tokens_forgotten"] += 1
        return RestoredRequest(
            one.submit,
            one.first_handle,
            tuple(own[:count] for own, count in zip(one.tokens, counts, strict=True)),
            tuple(own[:count] for own, count in zip(one.logprobs, counts, strict=True)),
            (None,) * one.submit.n,
        )

    # ------------------------------------------------------------------------------------------------------ invariants

    def _take_outputs(self) -> list[ConnectionOutput]:
        """What clients read: nothing of connection 0, and nothing on connections that are gone."""
        outputs = self.core.outputs()
        self._journal.write(self.core.take_notes(), outputs)
        self._journal.check(self.core.snapshot())
        self._check_confinement()
        for output in outputs:
            if output.connection in self._dead and (len(output.handles) or output.ends):
                raise RuleBrokenError(f"connection {output.connection} is gone and told {output}")
        return [one for one in outputs if one.connection != 0 and one.connection not in self._dead]


def run_harsh_scenario(scenario: Scenario, forgetful: float) -> Counter[str]:
    """Runs to the end. Whatever goes wrong names the seed."""
    simulation = HarshSimulation(scenario, forgetful)
    try:
        simulation.run()
    except Exception as error:
        raise RuleBrokenError(f"harsh seed {scenario.seed} at {simulation.now:.3f}s: {error!r}") from error
    return simulation.seen
