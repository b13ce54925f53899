"""One engine of real processes in one layout, judged by transformers: tokens, log probabilities, and bytes held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drumline.engine import SamplingParams
from drumline.engine.config import EngineConfig
from drumline.engine.layout_report.ranks import rank_reports
from drumline.engine.resolve import resolve
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.status import EngineStatus
from tests.parity.engine_runs import logprob_error, mixed_prompts, run_engine, scarce_config
from tests.parity.layout_cases import Case
from tests.parity.oracle import oracle_of

LENGTHS = (1, 2, 15, 16, 17, 31, 40, 48, 49, 65, 90, 120)
NEW_TOKENS = 48
TOP = 20
TOLERANCE = 1e-4
BYTES_TOLERANCE = 0.01


@dataclass(frozen=True)
class Judgement:
    """What a run came to. ``worst``: largest relative error of log probabilities; ``bytes_off``: largest relative
    difference between the weights that a rank holds and what the layout says."""

    title: str
    streams: int
    ties: int
    wrong: int
    worst: float
    bytes_off: float
    counters: dict[str, int]

    @property
    def passed(self) -> bool:
        """One stream in 500 may part at a tie; a run of 12 may hold that one."""
        return self.wrong == 0 and self.ties <= 1 and self.worst < TOLERANCE and self.bytes_off <= BYTES_TOLERANCE

    def line(self) -> str:
        kinds = ("preemptions", "chunked_prefills", "prefix_hit_tokens", "dummy_steps")
        counts = ", ".join(f"{self.counters[kind]} {kind}" for kind in kinds)
        return (
            f"{self.title}: {self.streams} streams, {self.wrong} wrong, {self.ties} ties, largest relative error "
            f"{self.worst:.1e}, bytes off {self.bytes_off:.2%}, {counts}"
        )


async def run_case(case: Case, checkpoint: Callable[[str], Path]) -> Judgement:
    """12 mixed requests in flight, 48 greedy tokens each."""
    folder = checkpoint(case.model)
    spec = ModelSpec.from_folder(str(folder))
    attn_dp = resolve(EngineConfig(str(folder), parallel=case.parallel)).layout.attention_data_parallel_size
    config = scarce_config(folder, case.parallel, replicas=min(case.parallel.data_parallel_size * attn_dp, 4))
    prompts = mixed_prompts(spec.vocab_size, seed=len(case.title), lengths=LENGTHS)
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=TOP)
    answers, status = await run_engine(config, prompts, [greedy] * len(prompts))
    oracle = oracle_of(folder)
    verdicts = [oracle.judge(one.prompt, one.tokens) for one in answers]
    assert all(len(one.tokens) == len(one.logprobs) == NEW_TOKENS for one in answers)
    assert all(replica.blocks_free == replica.blocks_total for replica in status.replicas)
    return Judgement(
        title=case.title,
        streams=len(answers),
        ties=sum(verdict.tie for verdict in verdicts),
        wrong=sum(not verdict.equal for verdict in verdicts),
        worst=max(logprob_error(oracle, one) for one in answers),
        bytes_off=bytes_off(config, status),
        counters=status.counters,
    )


def bytes_off(config: EngineConfig, status: EngineStatus) -> float:
    """Largest relative difference, over all ranks, between bytes of weights held and said."""
    resolved = resolve(config)
    placement = next(iter(resolved.placements.values()), None)
    said = rank_reports(resolved.layout, resolved.spec, placement, "float32", "float32", device="cpu")
    assert [rank.rank for rank in status.ranks] == [one.rank for one in said]
    pairs = zip(status.ranks, said, strict=True)
    return max(abs(rank.weight_bytes - one.total_weight_bytes) / one.total_weight_bytes for rank, one in pairs)
