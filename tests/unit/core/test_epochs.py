"""How the epochs of a group follow one another when ranks are lost, replaced and come back."""

from __future__ import annotations

from drumline.engine.core.decisions import EpochReady, FaultSeen, GroupClosed, JoinDue
from drumline.engine.core.members import GroupStage, RankState
from drumline.protocol.layout import Layout
from drumline.protocol.messages import Configure, Leave, OpenStore, Spawn
from tests.unit.core.fake_ranks import FakeRanks, config


def test_the_first_epoch_begins_when_all_ranks_have_loaded() -> None:
    ranks = FakeRanks()
    ranks.slow = {1}
    ranks.start()
    assert not ranks.said(Leave)
    ranks.load(1)
    assert ranks.said(EpochReady) == [EpochReady(0, 1, {0: 9, 1: 10}, (0, 1), ())]
    assert ranks.membership.all_ready
    assert not ranks.events("regroup")


def test_survivors_go_on_and_the_replacement_joins_when_it_has_loaded() -> None:
    ranks = FakeRanks().start()
    ranks.slow = {1}
    ranks.forget()
    ranks.now = 3.0
    ranks.kill(1)
    assert ranks.said(GroupClosed) == [GroupClosed(0, 1, (1,))]
    assert ranks.said(EpochReady) == [EpochReady(0, 2, {0: 9}, (0,), (0,))]
    (fault,) = ranks.said(FaultSeen)
    assert (fault.rank, fault.kind, fault.epoch, fault.inside) == (1, "exit", 1, False)
    assert "signal 9 (SIGKILL)" in fault.evidence
    assert not ranks.said(OpenStore)
    assert len(ranks.said(Spawn)) == 1
    assert ranks.membership.ranks[1].state is RankState.STARTING
    assert ranks.membership.ranks[1].restarts == 1

    ranks.forget()
    ranks.now = 4.0
    ranks.load(1)
    assert ranks.said(JoinDue) == [JoinDue(0)]
    assert ranks.membership.groups[0].stage is GroupStage.DRAINING
    assert not ranks.said(Leave)
    ranks.now = 4.5
    ranks.pump(ranks.membership.drained(0, ranks.now))
    assert not ranks.said(GroupClosed)
    assert ranks.said(EpochReady) == [EpochReady(0, 3, {0: 9, 1: 10}, (0, 1), (0,))]
    assert len(ranks.events("joined")) == 1


def test_ranks_whose_replica_lacks_another_are_parked() -> None:
    ranks = FakeRanks(config(Layout(2, 1, 2, enable_expert_parallel=True))).start()
    ranks.slow = {3}
    ranks.forget()
    ranks.kill(3)
    configures = ranks.said(Configure)
    assert [one.role for one in configures] == ["compute", "compute", "parked"]
    assert [member.rank for member in configures[2].parked] == [2]
    assert ranks.membership.ranks[2].state is RankState.PARKED
    (ready,) = ranks.said(EpochReady)
    assert (ready.serving, ready.kept) == ((0,), (0,))
    ranks.load(3)
    ranks.pump(ranks.membership.drained(0, ranks.now))
    assert ranks.said(EpochReady)[-1].serving == (0, 1)
    assert ranks.said(EpochReady)[-1].kept == (0,)
