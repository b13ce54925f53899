"""Whatever fails, in whatever order: epochs are consistent, and in the end everybody computes again."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from drumline.engine.core.decisions import Ended, EpochReady, GroupClosed, JoinDue, Output
from drumline.engine.core.members import GroupStage
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.layout import Layout
from drumline.protocol.messages import Configure, Leave, OpenStore
from tests.unit.core.fake_ranks import FakeRanks, config

LAYOUTS = (
    (Layout(2, 1, 1, enable_expert_parallel=True), False),
    (Layout(2, 1, 2, enable_expert_parallel=True), False),
    (Layout(2, 2, 1, enable_expert_parallel=True), False),
    (Layout(3, 1, 1, enable_expert_parallel=True), False),
    (Layout(2, 1, 2), False),
    (Layout(1, 1, 2, enable_expert_parallel=True), False),
    (Layout(2), True),
)

ACTION = st.tuples(
    st.sampled_from(
        ("kill", "segv", "exception", "numeric", "peer_lost", "store", "unreachable", "deaf", "slow", "load", "drain")
    ),
    st.integers(0, 3),
    st.sampled_from((Leave, Configure, OpenStore)),
    st.sampled_from((0.0, 0.01, 1.0, 3.0)),
)


class Checked(FakeRanks):
    """Looks at every epoch that closes or opens."""

    def __init__(self, layout: Layout, dense: bool) -> None:
        super().__init__(config(layout, dense=dense, restart_limit=1000))
        self.opened: dict[int, int] = {}
        self.served: dict[int, tuple[int, ...]] = {}

    @property
    def everybody_computes(self) -> bool:
        size = self.config.layout.world_size
        groups = self.membership.groups
        return self.membership.all_ready and all(len(self.served[one.id]) * size == len(one.ranks) for one in groups)

    def check(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert not isinstance(output, Ended)
            if isinstance(output, EpochReady):
                self._opens(output)
            elif isinstance(output, GroupClosed):
                assert set(output.lost) <= set(self.served.get(output.group, ()))

    def _opens(self, ready: EpochReady) -> None:
        group = self.membership.groups[ready.group]
        assert ready.epoch == group.epoch > self.opened.get(ready.group, 0)
        assert set(ready.kept) <= set(ready.serving)
        assert ready.serving
        self.opened[ready.group] = ready.epoch
        self.served[ready.group] = ready.serving
        size = self.config.layout.world_size
        computing = [group.ranks[place * size + at] for place in ready.serving for at in range(size)]
        assert list(ready.num_blocks) == computing
        for rank in computing:
            process = self.processes[rank]
            assert process.alive
            assert process.epoch == ready.epoch
        refit = group.refit
        assert refit is not None
        for layer in refit.placement:
            assert set(layer.tolist()) == set(range(self.config.num_experts))

    def pump(self, outputs: Iterable[Output]) -> None:
        before = len(self.out)
        super().pump(outputs)
        self.check(self.out[before:])

    def act(self, what: str, rank: int, deaf_to: type, seconds: float) -> None:
        rank %= self.config.layout.num_ranks
        process = self.processes[rank]
        if what in ("kill", "segv") and process.alive:
            self.kill(rank, 9 if what == "kill" else 11)
        elif what in ("exception", "numeric", "peer_lost", "store") and process.alive:
            self.fault(rank, "internal" if what == "exception" else what)
        elif what == "unreachable" and self.membership.ranks[rank].peer is not None:
            lost = ErrorInfo(kind="request_failed", text="unreachable", rank=rank)
            self.pump(self.membership.declare_lost(rank, "unreachable", lost, self.now))
        elif what == "deaf":
            process.mute = {deaf_to}
        elif what == "slow":
            self.slow.add(rank)
        elif what == "load":
            self.load_all({rank})
        elif what == "drain":
            self.drain()
        if seconds:
            self.wait(seconds)

    def load_all(self, ranks: set[int]) -> None:
        for rank in ranks & self.slow:
            self.slow.discard(rank)
            record = self.membership.ranks[rank]
            if record.peer is not None and not record.has_weights:
                self.load(rank)

    def drain(self) -> None:
        for group in self.membership.groups:
            if group.stage is GroupStage.DRAINING:
                self.pump(self.membership.drained(group.id, self.now))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LAYOUTS), st.lists(ACTION, max_size=14))
def test_in_the_end_everybody_computes_again(
    world: tuple[Layout, bool], actions: list[tuple[str, int, type, float]]
) -> None:
    layout, dense = world
    ranks = Checked(layout, dense)
    ranks.start()
    for action in actions:
        ranks.act(*action)
    ranks.load_all(set(ranks.slow))
    ranks.slow.clear()
    for _ in range(200):
        ranks.drain()
        if ranks.everybody_computes:
            break
        ranks.wait(1.0)
    assert ranks.everybody_computes
    assert ranks.membership.waiting_for == ""
    assert len(ranks.said(JoinDue)) <= len(ranks.said(EpochReady))
