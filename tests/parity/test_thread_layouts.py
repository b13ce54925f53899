"""Every kind of layout with ranks that are threads, against transformers: full logits and greedy tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.checkpoints import WIDE_VOCAB_SIZE, Checkpoints
from tests.parity.oracle import Oracle, relative_error
from tests.parity.stepdriver import Stream
from tests.parity.test_one_rank import TOLERANCE, mixed_streams
from tests.parity.threadranks import thread_driver

TP2 = {"tensor_parallel_size": 2}
TP4 = {"tensor_parallel_size": 4}
PP2 = {"pipeline_parallel_size": 2}
DP2 = {"data_parallel_size": 2}
EP = {"enable_expert_parallel": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-wide", TP2),
    ("llama-wide", {"pipeline_parallel_size": 3}),
    ("llama-wide", TP2 | PP2),
    ("llama-kv2", TP4 | {"attention_data_parallel_size": 2}),
    ("qwen2-wide", TP4),
    ("qwen3-wide", TP2 | PP2 | {"pipeline_partition": (2, 5)}),
    ("qwen3-moe-wide", TP2),
    ("qwen3-moe-wide", TP2 | DP2),
    ("qwen3-moe-wide", TP2 | DP2 | EP),
    ("qwen3-moe-wide", DP2 | PP2 | EP),
    ("qwen3-moe-wide", {"data_parallel_size": 3} | EP | {"all2all_backend": "all_to_all"}),
    ("qwen3-moe-kv2", TP4 | {"attention_data_parallel_size": 2}),
    ("qwen3-moe-kv2", TP4 | EP | {"attention_data_parallel_size": 2}),
    ("mixtral-wide", DP2 | TP2 | EP | {"all2all_backend": "all_to_all"}),
    ("deepseek-v2-wide", TP2),
    ("deepseek-v3-wide", TP4 | EP),
    ("deepseek-v3-wide", TP2 | PP2),
    ("deepseek-v3-wide", TP2 | DP2 | {"attention_data_parallel_size": 2}),
    # A dense layer before the experts, four attention replicas of one rank each, of which some have no token.
    ("deepseek-v3-wide", TP4 | EP | {"attention_data_parallel_size": 4, "all2all_backend": "all_to_all"}),
    ("qwen3-moe-kv2", TP4 | PP2 | {"attention_data_parallel_size": 2}),
    ("qwen3-moe-wide", TP2 | DP2 | PP2),
    # Tied embeddings, on both ends of a pipeline.
    ("llama-kv2", TP2 | {"pipeline_parallel_size": 3}),
]


def title(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key[:5]}{value}" for key, value in case[1].items())])


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=[title(case) for case in CASES])
def test_a_cut_model_gives_the_logits_and_the_greedy_tokens_of_transformers(
    name: str, sizes: dict[str, Any], checkpoints: Checkpoints
) -> None:
    folder = checkpoints(name)
    driver = thread_driver(folder, **sizes)
    streams = mixed_streams(seed=2, max_tokens=12, vocab_size=WIDE_VOCAB_SIZE)[:10]
    replicas = len(driver.replicas)
    shares = [streams[place::replicas] for place in range(replicas)]
    if replicas > 1:
        # The last replica runs out of work long before the others.
        shares[0].extend(shares[-1][1:])
        del shares[-1][1:]
        shares[-1][0].max_tokens = 3
    driver.run(shares)
    driver.close()
    oracle = Oracle(folder)
    worst = 0.0
    for stream in streams:
        assert oracle.judge(stream.prompt, stream.generated).equal
        expected = oracle.logits(stream.tokens)[len(stream.prompt) - 1 : -1]
        worst = max(worst, relative_error(torch.stack(stream.logits), expected))
    print(f"{title((name, sizes))}: largest relative error {worst:.1e}, {driver.counts}")
    assert worst < TOLERANCE
    assert replicas == 1 or driver.counts["dummy_steps"] > 0


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3-moe-wide", TP4),
        ("qwen3-moe-wide", TP4 | EP),
        ("deepseek-v3-wide", TP4 | EP | {"all2all_backend": "all_to_all"}),
        ("deepseek-v3-wide", TP4 | {"attention_data_parallel_size": 2}),
        ("mixtral-wide", TP2 | DP2 | EP),
    ],
    ids=str,
)
def test_one_token_for_all_ranks_leaves_most_of_them_without_any(
    name: str, sizes: dict[str, Any], checkpoints: Checkpoints
) -> None:
    folder = checkpoints(name)
    driver = thread_driver(folder, **sizes)
    stream = Stream([17], 6)
    driver.run([[stream], *([] for _ in driver.replicas[1:])])
    driver.close()
    oracle = Oracle(folder)
    assert oracle.judge(stream.prompt, stream.generated).equal
    assert relative_error(torch.stack(stream.logits), oracle.logits(stream.tokens)[:-1]) < TOLERANCE
