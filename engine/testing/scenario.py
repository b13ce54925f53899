"""Faults with a time or a point, as data: played on real processes by ``FaultyEngine.play``, and on the simulator."""

from __future__ import annotations

import random

import msgspec

from drumline.protocol import fault_names

RANK_KINDS = fault_names.RANK_KINDS
"""What befalls a rank, at a point. ``stop`` is SIGSTOP for ``seconds``; ``slow`` lasts as long, ``factor`` times as
slow."""
MESSAGE_KINDS = fault_names.MESSAGE_KINDS
"""What befalls messages between the coordinator and ranks; ``rank`` -1 means all of them."""
OTHER_KINDS = ("coordinator", "stopped_coordinator", "full_disk", "partition", "forkserver", "planner")
"""The coordinator is killed, or stopped for ``seconds``; the journal's disk is full, or ``rank`` cut off, for as long;
what starts the ranks is killed, or what plans placements of experts."""
POINTS = fault_names.POINTS
FROM_INSIDE = ("exit", "segv", "raise", "nan")
"""What looks as if a request had caused it."""


class ScheduledFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fault of ``kind``, ordered ``at_s`` seconds after the start of its scenario.

    ``rank``: whom it befalls, -1 where that does not apply. ``point``: where in its life the rank has it, at the first
    time that it comes there; ``step``: no sooner than in this step of its epoch. ``messages``: names of messages, none:
    all; ``probability``: of each, ``times``: at most so many, 0: any number.
    """

    kind: str
    at_s: float = 0.0
    rank: int = -1
    point: str = "now"
    step: int = -1
    seconds: float = 0.0
    factor: float = 1.0
    direction: str = "both"
    messages: tuple[str, ...] = ()
    probability: float = 1.0
    times: int = 0

    def __post_init__(self) -> None:
        if self.kind not in (*RANK_KINDS, *MESSAGE_KINDS, *OTHER_KINDS):
            raise ValueError(
                f"kind: found {self.kind!r}; valid: {', '.join((*RANK_KINDS, *MESSAGE_KINDS, *OTHER_KINDS))}"
            )
        if self.point not in POINTS:
            raise ValueError(f"point: found {self.point!r}; valid: {', '.join(POINTS)}")
        if self.rank < 0 and (self.kind in RANK_KINDS or self.kind == "partition"):
            raise ValueError(f"rank: found {self.rank}; valid: a rank, for {self.kind!r}")
        if self.at_s < 0 or self.seconds < 0:
            raise ValueError(f"at_s, seconds: found {self.at_s:g}, {self.seconds:g}; valid: at least 0")
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability: found {self.probability:g}; valid: 0.0 to 1.0")


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Faults in the order of their time. ``seed`` is that of the dice thrown for messages."""

    name: str
    faults: tuple[ScheduledFault, ...]
    seed: int = 0

    @property
    def seconds(self) -> float:
        """When the last fault is over, where faults have an end."""
        return max((fault.at_s + fault.seconds for fault in self.faults), default=0.0)


class Chances(msgspec.Struct, frozen=True):
    """How a random scenario is drawn. ``every_s``: the mean time between faults. ``inside_every_s``: how long at least
    between two faults from inside, so that no request is in two of them and suspected to cause them.
    ``longest_stop_s``: how long a rank is stopped at most. ``experts_move``: between steps, all the time."""

    every_s: float = 5.0
    inside_every_s: float = 60.0
    longest_stop_s: float = 20.0
    experts_move: bool = False


_DRAWN = (
    ("kill", 40),
    ("stop", 8),
    ("raise", 4),
    ("nan", 3),
    ("segv", 2),
    ("exit", 2),
    ("hang", 4),
    ("slow", 5),
    ("drop", 3),
    ("delay", 4),
    ("duplicate", 4),
    ("corrupt", 3),
    ("partition", 4),
    ("coordinator", 8),
    ("stopped_coordinator", 2),
    ("full_disk", 3),
    ("forkserver", 3),
)
_DRAWN_OF_SHUFFLES = (("planner", 3),)
TRIGGER_S = 0.2
_STEP_POINTS = ("step", "prefill", "decode")


def random_scenario(seed: int, ranks: int, seconds: float, chances: Chances | None = None) -> Scenario:
    """Faults for ``seconds``, the same for the same arguments. What is to happen in a regroup, or to a process that
    loads or joins, comes with a kill that makes it so."""
    chances = Chances() if chances is None else chances
    rng = random.Random(seed)
    faults: list[ScheduledFault] = []
    inside_at = -chances.inside_every_s
    drawn = (*_DRAWN, *(_DRAWN_OF_SHUFFLES if chances.experts_move else ()))
    at = rng.uniform(0.5, 1.5) * chances.every_s
    while at < seconds:
        kind = rng.choices([kind for kind, _ in drawn], [weight for _, weight in drawn])[0]
        if kind in FROM_INSIDE:
            kind = kind if at - inside_at >= chances.inside_every_s else "kill"
            inside_at = at if kind in FROM_INSIDE else inside_at
        fault = _drawn(rng, kind, at, ranks, chances)
        faults.append(fault)
        if (victim := _victim(fault, ranks)) >= 0:
            faults.append(ScheduledFault("kill", at + TRIGGER_S, victim))
        at += rng.uniform(0.5, 1.5) * chances.every_s
    return Scenario(f"random {seed}", tuple(faults), seed)


def _victim(fault: ScheduledFault, ranks: int) -> int:
    """Who must be killed for the fault's rank to come to its point, -1 for nobody."""
    if fault.point in ("loading", "joining"):
        return fault.rank
    return (fault.rank + 1) % ranks if fault.point in ("leave", "regroup") else -1


def _drawn(rng: random.Random, kind: str, at: float, ranks: int, chances: Chances) -> ScheduledFault:
    rank = rng.randrange(ranks)
    if kind in MESSAGE_KINDS:
        return ScheduledFault(
            kind,
            at,
            rng.choice((-1, rank)),
            seconds=rng.choice((0.01, 0.1)) if kind == "delay" else 2.0,
            probability=rng.choice((0.1, 0.5)),
            times=rng.choice((1, 3)) if kind in ("drop", "corrupt") else rng.choice((10, 50)),
        )
    if kind in ("coordinator", "forkserver", "planner"):
        return ScheduledFault(kind, at)
    if kind == "stopped_coordinator":
        return ScheduledFault(kind, at, seconds=rng.choice((0.5, 3.0)))
    if kind in ("full_disk", "partition"):
        return ScheduledFault(kind, at, rank if kind == "partition" else -1, seconds=rng.uniform(0.5, 3.0))
    moving = fault_names.SHUFFLE_POINTS if chances.experts_move else ()
    points = ("now", "now", "prefill", "decode", "joining", "loading", *moving)
    point = rng.choice((*points, "leave", "regroup") if ranks > 1 else points)
    if kind in ("raise", "nan", "hang", "slow"):
        point = rng.choice((*_STEP_POINTS, *(moving if kind in ("raise", "hang") else ())))
    return ScheduledFault(
        kind,
        at,
        rank,
        point,
        seconds=rng.uniform(1.0, chances.longest_stop_s) if kind == "stop" else 2.0 if kind == "slow" else 0.0,
        factor=rng.choice((2.0, 5.0)) if kind == "slow" else 1.0,
    )
