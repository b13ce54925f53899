"""Schedules as hypothesis draws them, so that a failing one shrinks to the few faults that matter."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from tests.simulation.cluster.faults import RANK_KINDS, RankFault
from tests.simulation.cluster.schedule import (
    CLIENTS,
    START_S,
    OtherFault,
    Schedule,
    make_shape,
    make_wanted,
)

DAY_S = 4.0
OTHER_KINDS = ("coordinator", "everything", "connection", "client", "slow_client", "full_disk", "partition")
_MOMENTS = st.floats(0.0, DAY_S).map(lambda at: START_S + round(at, 3))
_STEP_POINTS = ("step", "prefill", "decode")


@st.composite
def rank_faults(draw: st.DrawFn, ranks: int) -> RankFault:
    """One fault of one of ``ranks``."""
    kind = draw(st.sampled_from(RANK_KINDS))
    points = _STEP_POINTS if kind in ("raise", "nan", "slow") else ("now", *_STEP_POINTS, "regroup", "joining", "leave")
    seconds = {"stop": 20.0, "slow": 2.0}.get(kind, 0.0)
    return RankFault(
        kind, draw(st.integers(0, ranks - 1)), draw(_MOMENTS), draw(st.sampled_from(points)), seconds, factor=5.0
    )


@st.composite
def other_faults(draw: st.DrawFn, ranks: int) -> OtherFault:
    """One fault of somebody else."""
    kind = draw(st.sampled_from(OTHER_KINDS))
    who = draw(st.integers(0, (ranks if kind == "partition" else CLIENTS) - 1))
    seconds = {"slow_client": 2.0, "full_disk": 3.0, "partition": 4.0}.get(kind, 0.0)
    return OtherFault(kind, draw(_MOMENTS), who, seconds)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """An engine, requests, and any faults."""
    seed = draw(st.integers(0, 10_000))
    rng = random.Random(seed)
    shape = make_shape(rng)
    wanted = make_wanted(rng, shape, DAY_S)[: draw(st.integers(1, 6))]
    ranks = shape.layout.num_ranks
    shape.restart_limit = 60
    return Schedule(
        seed,
        shape,
        wanted,
        draw(st.lists(rank_faults(ranks), max_size=4)),
        draw(st.lists(other_faults(ranks), max_size=3)),
    )
