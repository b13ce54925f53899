"""A random engine, its requests and its misfortunes, all from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.protocol.layout import Layout
from drumline.protocol.messages import MessageFault, SamplingSpec, Submit
from tests.simulation.cluster.faults import POINTS, RANK_KINDS, RankFault
from tests.simulation.cluster.shape import Shape
from tests.simulation.cluster.streams import Wanted

CLIENTS = 2
START_S = 3.0
"""By then the engine is mostly up."""
FOREVER_S = 0.0

LAYOUTS = (
    Layout(1),
    Layout(2, enable_expert_parallel=True),
    Layout(2, enable_expert_parallel=True),
    Layout(3, enable_expert_parallel=True),
    Layout(4, enable_expert_parallel=True),
    Layout(2, 1, 2, enable_expert_parallel=True),
    Layout(2, 2, 1, enable_expert_parallel=True),
    Layout(2, 1, 2, enable_expert_parallel=True, attention_data_parallel_size=2),
    Layout(2, 1, 2),
    Layout(1, 2, 1),
)
MESSAGES_TO_RANK = ("Leave", "Configure", "Step", "OpenStore", "Load", "WelcomeWorker")
MESSAGES_FROM_RANK = ("Left", "Ready", "StepDone", "StoreReady", "Loaded", "BeatWorker", "Fault")


@dataclass(slots=True)
class OtherFault:
    """What befalls others than ranks. ``kind``: coordinator (killed), stopped_coordinator, everything (the
    supervisor and all that it owns), connection (of client ``who``), client (started anew), slow_client, full_disk,
    partition (of rank ``who``); for ``seconds``. stuck_link: no expert gets through from or to rank ``who``;
    rebalance and given_rebalance: somebody asks for one."""

    kind: str
    at: float
    who: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class TimedMessageFault:
    """A message fault from ``at`` on."""

    at: float
    fault: MessageFault


@dataclass(slots=True)
class Schedule:
    """One simulated day. ``generator``: the option that chooses who made it of its seed."""

    seed: int
    shape: Shape
    wanted: list[Wanted]
    rank_faults: list[RankFault] = field(default_factory=list)
    other_faults: list[OtherFault] = field(default_factory=list)
    message_faults: list[TimedMessageFault] = field(default_factory=list)
    crash_loop: bool = False
    generator: str = ""

    @property
    def may_end(self) -> bool:
        """Whether the rank that ends again and again leaves nobody who could serve."""
        shape = self.shape
        return self.crash_loop and (shape.layout.data_parallel_size == 1 or shape.growth_bytes == 0)

    @property
    def last_at(self) -> float:
        """When the last thing is planned to happen."""
        moments = [wanted.at for wanted in self.wanted]
        moments += [max(wanted.cancel_at, 0.0) for wanted in self.wanted]
        moments += [fault.at + fault.seconds for fault in self.rank_faults]
        moments += [fault.at + fault.seconds for fault in self.other_faults]
        moments += [timed.at + timed.fault.lasting_s + timed.fault.seconds for timed in self.message_faults]
        return max(moments, default=0.0)


def make_shape(rng: random.Random, given: Layout | None = None) -> Shape:
    """Small numbers on purpose: few blocks, few rows, short contexts. ``given``: a layout with expert parallel."""
    layout = given or rng.choice(LAYOUTS)
    dense = layout.data_parallel_size * layout.pipeline_parallel_size < 4 and not layout.enable_expert_parallel
    dense = dense and layout.tensor_parallel_size == 1 and rng.random() < 0.5
    if given is None and rng.random() < 0.12:
        layout, dense = Layout(2), True
    pp, attn_dp = layout.pipeline_parallel_size, layout.attention_data_parallel_size
    rows, block_size, context = rng.randint(2, 4) + pp, rng.choice((2, 3, 4)), rng.randint(16, 40)
    core = CoreConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=rng.randint(rows, 20),
        block_size=block_size,
        max_model_len=context,
        vocab_size=rng.choice((30, 1000)),
        eos_token_ids=(3,),
        data_parallel_size=layout.data_parallel_size,
        lockstep=not dense,
        enable_prefix_caching=rng.random() < 0.7,
        async_scheduling=rng.random() < 0.8,
        max_waiting=100,
        pipeline_parallel_size=pp,
        attention_data_parallel_size=attn_dp,
        attention_tensor_parallel_size=layout.attn_tp_size,
    )
    whole = -(-context // block_size)
    blocks = max(whole, round(whole * rng.uniform(1.0, 2.5)))
    experts = 0 if dense else layout.ep_size * 2 + rng.randint(0, 1)
    return Shape(
        layout=layout,
        core=core,
        num_blocks=blocks,
        num_experts=experts,
        moe_layer_stage=() if dense else tuple(range(pp)) if pp > 1 else (0, 0),
        growth_bytes=rng.choice((None, None, 0)),
        step_s=rng.choice((0.01, 0.03)),
        delay_s=rng.choice((0.0005, 0.005, 0.03)),
        load_s=rng.choice((0.3, 1.0)),
        commit_s=rng.choice((0.001, 0.02)),
        kill_s=rng.choice((0.01, 0.01, 8.0)),
        silent_deaths=rng.choice((0.0, 0.0, 0.0, 0.3)),
        through_codec=rng.random() < 0.1,
        keeps_journal=rng.random() < 0.9,
    )


def make_schedule(seed: int) -> Schedule:
    """One day of one engine."""
    rng = random.Random(seed)
    shape = make_shape(rng)
    day = rng.choice((2.0, 6.0, 12.0))
    schedule = Schedule(seed, shape, make_wanted(rng, shape, day))
    ranks = shape.layout.num_ranks
    for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 6))):
        fault = make_rank_fault(rng, ranks, day)
        schedule.rank_faults.append(fault)
        if rng.random() < 0.3:
            # A second one in the recovery from the first.
            kind, point = rng.choice(("kill", "stop", "coordinator")), rng.choice(("leave", "regroup", "joining"))
            schedule.rank_faults.append(RankFault(kind, rng.randrange(ranks), fault.at, point, 3.0))
    if rng.random() < 0.15:
        # A burst.
        at = START_S + rng.uniform(0, day)
        count = rng.randint(2, 4)
        schedule.rank_faults += [RankFault("kill", rng.randrange(ranks), at + 0.01 * i) for i in range(count)]
    make_other_faults(schedule, rng, day)
    if rng.random() < 0.15:
        schedule.message_faults.append(make_message_fault(rng, ranks, day))
    # A poisoned request or a fenced sleeper needs starts of its own: that they run out is tried by itself.
    shape.restart_limit = 60
    if rng.random() < 0.04:
        make_crash_loop(schedule, rng)
    return schedule


def make_other_faults(schedule: Schedule, rng: random.Random, day: float) -> None:
    """What befalls others than ranks."""
    for kind, chance in _OTHER_CHANCES:
        if rng.random() < chance:
            at = START_S + rng.uniform(-2.0, day)
            who = rng.randrange(schedule.shape.layout.num_ranks if kind == "partition" else CLIENTS)
            schedule.other_faults.append(OtherFault(kind, max(at, 0.2), who, _seconds(rng, kind)))


def make_crash_loop(schedule: Schedule, rng: random.Random) -> None:
    """One rank dies while it loads, again and again; nothing else happens."""
    shape = schedule.shape
    shape.restart_limit = 2
    shape.silent_deaths, shape.kill_s = 0.0, 0.01
    rank = rng.randrange(shape.layout.num_ranks)
    dies = [RankFault("kill", rank, START_S + 0.5, "loading") for _ in range(shape.restart_limit)]
    schedule.rank_faults = [RankFault("kill", rank, START_S + 1.0), *dies]
    schedule.other_faults.clear()
    schedule.message_faults.clear()
    for wanted in schedule.wanted:
        wanted.poison = wanted.not_finite = False
    schedule.crash_loop = True


_OTHER_CHANCES = (
    ("coordinator", 0.25),
    ("coordinator", 0.08),
    ("stopped_coordinator", 0.08),
    ("everything", 0.04),
    ("connection", 0.15),
    ("client", 0.08),
    ("slow_client", 0.15),
    ("full_disk", 0.06),
    ("partition", 0.08),
)


def _seconds(rng: random.Random, kind: str) -> float:
    if kind in ("partition", "stopped_coordinator"):
        return rng.choice((0.5, 4.0, 15.0))
    if kind in ("slow_client", "full_disk"):
        return rng.uniform(0.5, 4.0)
    return 0.0


def make_rank_fault(rng: random.Random, ranks: int, day: float) -> RankFault:
    """One fault of one rank, at a moment or at a point."""
    kind = rng.choice(("kill", "kill", "stop", *RANK_KINDS))
    point = rng.choice(POINTS)
    if kind in ("raise", "nan", "slow"):
        point = rng.choice(("step", "prefill", "decode"))
    seconds = rng.choice((0.3, 3.0, 20.0)) if kind == "stop" else 2.0 if kind == "slow" else 0.0
    at = 0.5 if point in ("loading", "joining") and rng.random() < 0.5 else START_S + rng.uniform(-1.0, day)
    return RankFault(kind, rng.randrange(ranks), at, point, seconds, rng.choice((2.0, 20.0)) if kind == "slow" else 1.0)


def make_message_fault(
    rng: random.Random,
    ranks: int,
    day: float,
    of: tuple[tuple[str, ...], tuple[str, ...]] = (MESSAGES_TO_RANK, MESSAGES_FROM_RANK),
) -> TimedMessageFault:
    """Messages that are lost, late, double or unreadable for a while."""
    kind = rng.choice(("drop", "delay", "duplicate", "corrupt"))
    direction = rng.choice(("to_worker", "from_worker"))
    names = of[0] if direction == "to_worker" else of[1]
    fault = MessageFault(
        kind=kind,
        direction=direction,
        messages=(rng.choice(names),) if rng.random() < 0.7 else (),
        ranks=(rng.randrange(ranks),) if rng.random() < 0.7 else (),
        probability=rng.choice((0.1, 0.5, 1.0)),
        seed=rng.randrange(1000),
        seconds=rng.choice((0.01, 0.2, 1.0)) if kind in ("delay", "duplicate") else 0.0,
        lasting_s=rng.uniform(0.2, 2.0),
        times=rng.choice((1, 2, 5)),
    )
    return TimedMessageFault(START_S + rng.uniform(-2.0, day), fault)


def make_wanted(rng: random.Random, shape: Shape, day: float) -> list[Wanted]:
    """A handful of requests; now and then one that kills whoever computes it, or whose numbers are not finite."""
    core = shape.core
    shared = [rng.randrange(core.vocab_size) for _ in range(core.max_model_len)]
    wanted: list[Wanted] = []
    for number in range(rng.choice((2, 4, 6, 9))):
        length = rng.randint(1, max(1, core.max_model_len // 2))
        kept = rng.randint(0, length) if rng.random() < 0.5 else 0
        prompt = shared[:kept] + [rng.randrange(core.vocab_size) for _ in range(length - kept)]
        at = rng.uniform(0.0, START_S + day)
        one = Wanted(make_submit(rng, shape, number, prompt), rng.randrange(CLIENTS), at)
        if rng.random() < 0.1:
            one.cancel_at = at + rng.uniform(0, 4)
        if rng.random() < 0.1:
            one.stop_after = rng.randint(1, 6)
        wanted.append(one)
    luck = rng.random()
    if luck < 0.06:
        rng.choice(wanted).poison = True
    elif luck < 0.1:
        rng.choice(wanted).not_finite = True
    return wanted


def make_submit(rng: random.Random, shape: Shape, number: int, prompt: list[int]) -> Submit:
    """One submission. Its seed is its own, so that the simulated ranks know the request by it."""
    core = shape.core
    max_tokens = rng.choice((1, rng.randint(1, 12), rng.randint(4, 30), 60))
    stops = tuple(rng.randrange(core.vocab_size) for _ in range(rng.choice((0, 0, 1))))
    sampling = SamplingSpec(
        seed=1000 * number + rng.randrange(1000),
        min_tokens=rng.randint(0, min(4, max_tokens)) if rng.random() < 0.2 else 0,
        stop_token_ids=stops,
        logprobs=0 if rng.random() < 0.15 else -1,
    )
    return Submit(
        call_id=0,
        request_id=f"r{number}",
        prompt=np.asarray(prompt, dtype=np.int32),
        sampling=sampling,
        max_tokens=max_tokens,
        n=rng.choice((1, 1, 1, 2)),
        seed_given=rng.random() < 0.8,
        ignore_eos=rng.random() < 0.5,
        priority=rng.choice((0, 0, 0, -1, 2)),
        data_parallel_rank=rng.randrange(core.data_parallel_size) if rng.random() < 0.1 else -1,
        nonce=f"nonce-{number}",
        durable=rng.random() < 0.6,
    )
