"""Coordinator work per decode step: plan, encode, decode of the replies, apply. On the real core and the real codec.

The workers are left out: their replies are encoded beforehand, outside the clock. Every row decodes in every step, two
steps are in flight as in production, and nothing ends. Rows stand at random places in their blocks (as after requests
of all lengths), and once more all at the same place, where every 16th step needs a block for every row at once.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.outputs import ConnectionOutput
from drumline.protocol.codec import Codec
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import (
    Accepted,
    FromWorker,
    SamplingSpec,
    Step,
    StepDone,
    Submit,
    ToClient,
    Tokens,
    ToWorker,
)

DEFAULT_ROWS = (8, 64, 256, 1024, 4096)
WIDE_REPLICAS = 64
WIDE_ROWS = 256
BLOCK_SIZE = 16
VOCAB_SIZE = 32_000
PROMPT_BLOCKS = 4
EOS = 2
MAX_TOKENS = 4096
WARM_UP = 50
# Every row generates in every step, and none may reach its length while the clock runs.
MAX_STEPS = MAX_TOKENS - 1024
_CONNECTION = 1


class SchedulerResult(msgspec.Struct, frozen=True):
    """Medians over steps, microseconds, ``rows`` per replica. ``total_us`` is of plan + encode + decode + apply
    together.

    ``aligned_p99_us``: 99th percentile of the same total with all rows at the same place in their blocks. Beside it:
    ``maintain_us`` (prefix hashing, after the sends) and ``client_us`` (sorting tokens by connection, encoding the
    frame).
    """

    replicas: int
    rows: int
    total_us: float
    total_p99_us: float
    plan_us: float
    encode_us: float
    decode_us: float
    apply_us: float
    client_us: float
    maintain_us: float
    aligned_total_us: float
    aligned_p99_us: float
    plan_bytes: int
    steps: int


class Machine(msgspec.Struct, frozen=True):
    """``cpu``: its model's name. ``cores``: those this process may use. ``python`` and ``numpy``: their versions."""

    cpu: str
    cores: int
    python: str
    numpy: str


class SchedulerReport(msgspec.Struct, frozen=True):
    """``results``: one per case, in the order measured."""

    machine: Machine
    results: tuple[SchedulerResult, ...]


def run(rows: Sequence[int] = DEFAULT_ROWS, replicas: int | None = None, steps: int = 300) -> SchedulerReport:
    """Measures each of ``rows`` per replica on ``replicas`` in one lockstep group; without ``replicas``, on one, and
    then 64 replicas of 256 rows. Raises :class:`InvalidConfig` when there would be more ``steps`` than a row lives."""
    if not 1 <= steps <= MAX_STEPS:
        raise InvalidConfig("steps", steps, f"1 to {MAX_STEPS}")
    cases = [(replicas or 1, count) for count in rows]
    if replicas is None and tuple(rows) == DEFAULT_ROWS:
        cases.append((WIDE_REPLICAS, WIDE_ROWS))
    return SchedulerReport(machine(), tuple(measure(count, per_replica, steps) for count, per_replica in cases))


def machine() -> Machine:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    cores = len(os.sched_getaffinity(0))
    return Machine(cpu, cores, platform.python_version(), np.__version__)


def measure(replicas: int, rows: int, steps: int) -> SchedulerResult:
    """``steps`` timed steps at random block phases, and as many at one phase."""
    random = _Bench(replicas, rows, aligned=False).run(steps)
    aligned = _Bench(replicas, rows, aligned=True).run(steps)
    total = random.total()
    return SchedulerResult(
        replicas=replicas,
        rows=rows,
        total_us=_median(total),
        total_p99_us=_p99(total),
        plan_us=_median(random.plan),
        encode_us=_median(random.encode),
        decode_us=_median(random.decode),
        apply_us=_median(random.apply),
        client_us=_median(random.client),
        maintain_us=_median(random.maintain),
        aligned_total_us=_median(aligned.total()),
        aligned_p99_us=_p99(aligned.total()),
        plan_bytes=round(random.plan_bytes / steps),
        steps=steps,
    )


class _Times:
    """Nanoseconds, one entry per step."""

    def __init__(self) -> None:
        self.plan: list[int] = []
        self.encode: list[int] = []
        self.decode: list[int] = []
        self.apply: list[int] = []
        self.client: list[int] = []
        self.maintain: list[int] = []
        self.plan_bytes = 0

    def total(self) -> list[int]:
        return [sum(parts) for parts in zip(self.plan, self.encode, self.decode, self.apply, strict=True)]


class _Bench:
    """A core whose rows all decode, with two steps in flight."""

    def __init__(self, replicas: int, rows: int, aligned: bool) -> None:
        self._rows = rows
        self._random = np.random.default_rng(7)
        self._to_worker: Codec[Any] = Codec(ToWorker)
        self._from_worker: Codec[Any] = Codec(FromWorker)
        self._to_client: Codec[Any] = Codec(ToClient)
        self._in_flight: deque[list[tuple[int, Step]]] = deque()
        self._frame = 0
        longest = BLOCK_SIZE * PROMPT_BLOCKS + MAX_TOKENS
        config = CoreConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=max(rows, 2048),
            block_size=BLOCK_SIZE,
            max_model_len=longest,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            data_parallel_size=replicas,
            lockstep=True,
            max_waiting=replicas * rows,
        )
        blocks_per_row = -(-longest // BLOCK_SIZE)
        self.core = EngineCore(config, [rows * blocks_per_row] * replicas, term=1, seed=0)
        self.core.open_epoch(0, 1)
        for number in range(replicas * rows):
            self._submit(number, replicas, BLOCK_SIZE if aligned else int(self._random.integers(1, BLOCK_SIZE + 1)))
        self._start(replicas * rows)

    def run(self, steps: int) -> _Times:
        for _ in range(min(WARM_UP, steps)):
            self._step(_Times())
        times = _Times()
        gc.collect()
        gc.freeze()
        for _ in range(steps):
            self._step(times)
        gc.unfreeze()
        return times

    def _submit(self, number: int, replicas: int, phase: int) -> None:
        prompt = self._random.integers(3, VOCAB_SIZE, (PROMPT_BLOCKS - 1) * BLOCK_SIZE + phase).astype(np.int32)
        submit = Submit(number, f"r{number}", prompt, SamplingSpec(), MAX_TOKENS, data_parallel_rank=number % replicas)
        answer = self.core.submit(_CONNECTION, submit, 0.0)
        if not isinstance(answer, Accepted):
            raise ValueError(f"the benchmark's own request was refused: {answer.error.text}")

    def _start(self, rows: int) -> None:
        """Steps until every row decodes."""
        running = 0
        while running < rows or any(len(step.prefill_rows) for _, step in self._in_flight[-1]):
            self._step(_Times())
            running = sum(replica.running for replica in self.core.replica_status())

    def _step(self, times: _Times) -> None:
        core, clock = self.core, time.perf_counter_ns
        begin = clock()
        planned = core.plan(0.0)
        planned_at = clock()
        frames = [self._to_worker.encode(step) for _, step in planned]
        encoded_at = clock()
        times.plan.append(planned_at - begin)
        times.encode.append(encoded_at - planned_at)
        times.plan_bytes += sum(len(frame) for message in frames for frame in message)
        core.maintain(0.0)
        times.maintain.append(clock() - encoded_at)
        self._in_flight.append(planned)
        if len(self._in_flight) < 2:
            return
        replies = [self._reply(replica, step) for replica, step in self._in_flight.popleft()]
        begin = clock()
        answers = [(replica, self._from_worker.decode(reply)) for replica, reply in replies]
        decoded_at = clock()
        for replica, done in answers:
            core.apply(replica, done, 0.0)
        outputs = core.outputs()
        applied_at = clock()
        self._tell(outputs)
        times.decode.append(decoded_at - begin)
        times.apply.append(applied_at - decoded_at)
        times.client.append(clock() - applied_at)

    def _reply(self, replica: int, step: Step) -> tuple[int, list[bytes]]:
        count = self._sampling(step, replica)
        tokens = self._random.integers(3, VOCAB_SIZE, count).astype(np.int32)
        done = StepDone(step.term, step.epoch, replica, step.step, tokens, tokens[:0])
        return replica, [bytes(frame) for frame in self._from_worker.encode(done)]

    def _sampling(self, step: Step, replica: int) -> int:
        """Rows that sample: while rows still come in, those that finish their prefill, else all."""
        if not len(step.prefill_rows) and int(step.num_tokens_across_dp[replica]) == self._rows:
            return self._rows
        record = next(r for r in self.core._groups[0].in_flight if r.step == step.step)
        return record.bounds[replica + 1] - record.bounds[replica]

    def _tell(self, outputs: list[ConnectionOutput]) -> None:
        for output in outputs:
            self._frame += 1
            message = Tokens(self._frame, output.handles, output.positions, output.tokens, output.logprob_index)
            self._to_client.encode(message)


def _median(nanoseconds: list[int]) -> float:
    return round(float(np.median(nanoseconds)) / 1000, 1)


def _p99(nanoseconds: list[int]) -> float:
    return round(float(np.percentile(nanoseconds, 99)) / 1000, 1)
