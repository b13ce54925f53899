"""What a runner refuses, and what a numeric fault leaves behind."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from drumline.protocol.errors import InvalidConfig, ProtocolError
from drumline.protocol.messages import Admit, SamplingSpec, Step
from drumline.protocol.modelspec import ModelSpec
from drumline.workers.groups import PeerLost
from drumline.workers.model_runner import ModelRunner, NumericFault
from tests.checkpoints import Checkpoints
from tests.parity.stepdriver import GREEDY, StepDriver, Stream, loaded_runner, worker_config


def int32(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def first_step(
    prompts: dict[int, list[int]], counts: np.ndarray[Any, np.dtype[np.int32]], sampling: SamplingSpec = GREEDY
) -> Step:
    """A step that admits ``prompts`` by row, each with blocks of its own, and computes them whole."""
    admitted = tuple(
        Admit(row, int32(*prompt), len(prompt), 0, np.arange(row * 16, row * 16 + 16, dtype=np.int32), sampling)
        for row, prompt in prompts.items()
    )
    lengths = int32(*(len(prompt) for prompt in prompts.values()))
    return Step(1, 1, 1, 1, counts, int32(), admitted, int32(), int32(), int32(*prompts), lengths)


def decode_step(*counts: int) -> Step:
    return Step(1, 1, 1, 2, int32(*counts), int32(), (), int32(), int32(), int32(), int32())


@pytest.fixture
def runner(checkpoints: Checkpoints) -> ModelRunner:
    return loaded_runner(worker_config(checkpoints("qwen3-moe")))


def test_a_header_that_disagrees_with_the_rows_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(ProtocolError, match="says 4 tokens for replica 0, its rows make 3"):
        runner.execute(first_step({0: [1, 2, 3]}, int32(4)))


def test_a_header_of_another_number_of_replicas_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(ProtocolError, match="for 1 replicas"):
        runner.execute(first_step({0: [1, 2, 3]}, int32(3, 0)))


def test_a_step_beyond_the_token_budget_is_refused(runner: ModelRunner) -> None:
    prompts = {row: list(range(64)) for row in range(3)}
    with pytest.raises(ProtocolError, match="has 192 tokens; valid: 0 to 128"):
        runner.execute(first_step(prompts, int32(192)))


def test_logits_that_are_not_finite_name_their_rows_and_poison_nobody_else(runner: ModelRunner) -> None:
    reference = runner.execute(first_step({5: [9, 8, 7]}, int32(3))).tokens.tolist()
    runner.reset()
    assert runner.model.embedding is not None
    weight = runner.model.embedding.weight
    clean = weight[77].clone()
    weight[77] = float("nan")
    with pytest.raises(NumericFault, match="rows 2") as caught:
        runner.execute(first_step({1: [1, 2, 3], 2: [4, 77, 5], 5: [6]}, int32(7)))
    assert caught.value.rows == (2,)
    assert caught.value.info.kind == "numeric"
    weight[77] = clean
    for part in (*runner.cache.keys, *runner.cache.values):
        assert part is not None
        assert bool(part.isfinite().all())
    runner.reset()
    assert runner.execute(first_step({5: [9, 8, 7]}, int32(3))).tokens.tolist() == reference


def test_a_step_that_is_left_halfway_leaves_no_nan_behind(runner: ModelRunner) -> None:
    reference = runner.execute(first_step({5: [9, 8, 7]}, int32(3))).tokens.tolist()
    runner.reset()

    def left(*_: Any) -> Any:
        runner.cache.keys[0][:, 80, 0] = float("nan")
        raise PeerLost("rank 1 is gone")

    with mock.patch.object(runner.model.layers[1], "mlp", left), pytest.raises(PeerLost):
        runner.execute(first_step({5: [9, 8, 7]}, int32(3)))
    assert not bool(runner.cache.keys[0].isfinite().all())
    runner.reset()
    assert bool(runner.cache.keys[0].isfinite().all())
    assert runner.execute(first_step({5: [9, 8, 7]}, int32(3))).tokens.tolist() == reference


def test_an_infinite_logit_alone_is_noticed(runner: ModelRunner) -> None:
    assert runner.model.head is not None
    runner.model.head.linear.weight[3] = float("inf")
    with pytest.raises(NumericFault, match="logits are NaN or infinite in rows 0, 4"):
        runner.execute(first_step({0: [1, 2], 4: [3]}, int32(3)))


@pytest.mark.parametrize(
    ("sizes", "experts", "found"),
    [
        ({}, [[0, 1]], "1 layers; valid: none"),
        ({"enable_expert_parallel": True}, [[0, 1, 2, 3, 4, 5, 6, 7]] * 2, "2 layers; valid: 3, one per MoE layer"),
        ({"enable_expert_parallel": True}, [[0, 1, 8]] * 3, "experts 0 to 8; valid: 0 to 7"),
    ],
)
def test_experts_that_the_model_does_not_have_are_not_loaded(
    checkpoints: Checkpoints, sizes: dict[str, Any], experts: list[list[int]], found: str
) -> None:
    config = worker_config(checkpoints("qwen3-moe"), **sizes)
    runner = ModelRunner(config, ModelSpec.from_folder(config.model), torch.device("cpu"), config.layout, 0)
    with pytest.raises(InvalidConfig, match=found):
        runner.load(np.array(experts, dtype=np.int32))


def test_no_step_runs_on_a_rank_without_a_place_in_an_epoch(checkpoints: Checkpoints) -> None:
    config = worker_config(checkpoints("qwen3-moe"))
    runner = ModelRunner(config, ModelSpec.from_folder(config.model), torch.device("cpu"), config.layout, 0)
    runner.load(np.zeros((0, 0), dtype=np.int32))
    runner.init_kv_cache()
    with pytest.raises(ProtocolError, match="no place in an epoch"):
        runner.execute(first_step({0: [1, 2, 3]}, int32(3)))


def test_spoiled_logits_are_a_numeric_fault_of_the_first_row_once(runner: ModelRunner) -> None:
    prompts = {1: [1, 2, 3], 5: [6, 7]}
    runner.spoil_next_logits()
    with pytest.raises(NumericFault, match="logits are NaN or infinite in rows 1"):
        runner.execute(first_step(prompts, int32(5)))
    runner.reset()
    assert len(runner.execute(first_step(prompts, int32(5))).tokens) == 2


def test_rows_that_do_not_reach_their_last_token_give_no_token(runner: ModelRunner) -> None:
    step = first_step({0: [1, 2, 3, 4]}, int32(2))
    partial = Step(1, 1, 1, 1, int32(2), int32(), step.admitted, int32(), int32(), int32(0), int32(2))
    assert runner.execute(partial).tokens.tolist() == []
    rest = Step(1, 1, 1, 2, int32(2), int32(), (), int32(), int32(), int32(0), int32(2))
    assert len(runner.execute(rest).tokens) == 1


def test_logprobs_carry_the_place_of_their_row(runner: ModelRunner) -> None:
    step = first_step({0: [1, 2], 3: [5]}, int32(3))
    asking = tuple(
        Admit(
            a.row, a.tokens, a.prompt_len, 0, a.blocks, SamplingSpec(temperature=0.0, logprobs=2 if a.row == 3 else -1)
        )
        for a in step.admitted
    )
    step = Step(1, 1, 1, 1, step.num_tokens_across_dp, int32(), asking, int32(), int32(), *_prefill(step))
    output = runner.execute(step)
    assert output.logprob_index.tolist() == [1]
    (entry,) = output.logprobs
    assert entry.token == int(output.tokens[1]) == int(entry.top_tokens[0])
    assert entry.rank == 1


def _prefill(step: Step) -> tuple[Any, Any]:
    return step.prefill_rows, step.prefill_counts


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSpec(temperature=0.0, repetition_penalty=1.3),
        SamplingSpec(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingSpec(temperature=0.9, seed=4, frequency_penalty=0.7, top_k=50),
    ],
)
def test_penalties_do_not_notice_evictions_chunks_or_shared_blocks(
    checkpoints: Checkpoints, sampling: SamplingSpec
) -> None:
    config = worker_config(checkpoints("qwen3-moe"))
    prompt = [int(token) for token in np.random.default_rng(3).integers(0, 256, 50)]
    quiet = Stream(list(prompt), 40, sampling)
    driver = StepDriver([[loaded_runner(config)]])
    driver.run([[quiet]])
    driver.close()
    disturbed = [Stream(list(prompt), 40, sampling)] + [Stream(prompt[: 10 * i], 30) for i in range(1, 5)]
    driver = StepDriver([[loaded_runner(config)]], seed=1, evict_chance=0.2, share_prefixes=True)
    driver.run([disturbed])
    driver.close()
    assert driver.counts["evictions"] > 0
    assert driver.counts["cached_tokens"] > 0
    assert disturbed[0].generated == quiet.generated


def test_greedy_penalties_equal_those_applied_by_hand(checkpoints: Checkpoints) -> None:
    sampling = SamplingSpec(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2)
    stream = Stream(list(range(30, 50)), 30, sampling)
    driver = StepDriver([[loaded_runner(worker_config(checkpoints("llama")))]])
    driver.run([[stream]])
    driver.close()
    for position, token in enumerate(stream.generated):
        scores = stream.logits[position].clone()
        output = stream.generated[:position]
        for seen in set(stream.prompt + output):
            scores[seen] = scores[seen] / 1.5 if scores[seen] > 0 else scores[seen] * 1.5
        for made in output:
            scores[made] -= 0.2
        for made in set(output):
            scores[made] -= 0.3
        assert int(scores.argmax()) == token
