"""Several ranks compute one replica's rows: each gets the same plan, one of them answers, the others acknowledge."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.protocol.messages import Finished, StepDone, Tokens
from tests.integration.engine.simulated_ranks import NUM_BLOCKS, PROMPT, SEED, RawClient, SimulatedEngine, simulated
from tests.simulation.oracle import expected_output

STAGES = EngineConfig("demo", parallel=ParallelConfig(pipeline_parallel_size=2, tensor_parallel_size=2))
REPORTS = 2
"""The first rank of the last of two stages of two."""
REPLICAS = EngineConfig(
    "demo",
    parallel=ParallelConfig(
        data_parallel_size=2, pipeline_parallel_size=2, tensor_parallel_size=2, enable_expert_parallel=True
    ),
)
ATTENTION = EngineConfig(
    "demo",
    parallel=ParallelConfig(
        data_parallel_size=2, tensor_parallel_size=4, enable_dp_attention=True, enable_expert_parallel=True
    ),
)
"""The model has two KV heads: two attention replicas of two ranks in each engine replica."""


async def read_all(client: RawClient, streams: int) -> dict[int, list[int]]:
    """Every token until ``streams`` streams have ended, by handle, in the order of their positions."""
    tokens: dict[int, dict[int, int]] = {}
    ended = sum(len(message.ends) for message in client.seen if isinstance(message, Finished))
    while ended < streams:
        ended += len((await client.read(Finished)).ends)
    for message in client.seen:
        if isinstance(message, Tokens):
            entries = zip(message.handles.tolist(), message.positions.tolist(), message.tokens.tolist(), strict=True)
            for handle, position, token in entries:
                tokens.setdefault(handle, {})[position] = token
    return {handle: [own[position] for position in sorted(own)] for handle, own in tokens.items()}


def expected(index: int, max_tokens: int, vocab_size: int) -> list[int]:
    return list(expected_output(list(PROMPT), SEED, index, frozenset(), 0, max_tokens, vocab_size).tokens)


async def test_two_stages_of_two_ranks_serve_one_replica_in_two_lanes(runtime_root: Path) -> None:
    async with simulated(STAGES, runtime_root) as engine:
        client = engine.client()
        welcome = await client.welcome()
        accepted = await client.accepted("r", max_tokens=12, n=5)
        tokens = await read_all(client, 5)
        for index, handle in enumerate(accepted.handles.tolist()):
            assert tokens[handle] == expected(index, 12, welcome.info.vocab_size)
        status = await client.status()
        steps = {rank.steps for rank in engine.ranks.values()}
        assert (len(engine.ranks), steps) == (4, {status.groups[0].step + 1})
        assert (status.groups[0].replicas, len(status.replicas)) == ((0,), 1)
        # Five rows over two lanes: each of a row's 12 tokens takes a step of its lane.
        assert status.groups[0].step + 1 >= 2 * 12


async def test_a_plan_is_encoded_once_for_all_ranks_of_its_replica(
    runtime_root: Path,
) -> None:
    async with simulated(STAGES, runtime_root) as engine:
        encoded = count_plans(engine)
        client = engine.client()
        await client.welcome()
        await client.accepted("r", max_tokens=5)
        await client.read(Finished)
        assert len(encoded) == 5
        assert {rank.steps for rank in engine.ranks.values()} == {5}


def count_plans(engine: SimulatedEngine) -> list[object]:
    """What the coordinator encodes for workers from now on."""
    encoded: list[object] = []
    codec = engine.coordinator.workers._to_workers
    encode = codec.encode

    def counting(message: object) -> object:
        encoded.append(message)
        return encode(message)  # type: ignore[arg-type]

    codec.encode = counting  # type: ignore[method-assign, assignment]
    return encoded


async def test_a_replica_has_the_blocks_of_its_smallest_rank_and_the_status_tells_those_of_each(
    runtime_root: Path,
) -> None:
    blocks = {0: NUM_BLOCKS, 1: 40, 2: 50, 3: 60, 4: NUM_BLOCKS, 5: NUM_BLOCKS, 6: NUM_BLOCKS, 7: 70}
    async with simulated(REPLICAS, runtime_root, num_blocks=blocks.__getitem__) as engine:
        client = engine.client()
        welcome = await client.welcome()
        status = await client.status()
        assert [replica.blocks_total for replica in status.replicas] == [40, 70]
        assert status.kv_blocks == 40
        assert {rank.rank: rank.kv_blocks for rank in status.ranks} == blocks
        assert {rank.weight_bytes for rank in status.ranks} == {1000}
        assert welcome.info.max_prompt_tokens == 40 * welcome.info.block_size - 1
        assert status.groups[0].replicas == (0, 1)


async def test_tokens_from_a_rank_that_only_acknowledges_are_its_loss(runtime_root: Path) -> None:
    async with simulated(STAGES, runtime_root) as engine:
        client = engine.client()
        await client.welcome()

        def talkative(done: StepDone) -> StepDone:
            return msgspec.structs.replace(done, tokens=np.zeros(1, dtype=np.int32))

        engine.ranks[REPORTS + 1].answer = talkative
        await client.accepted("r")
        fault = await client.event("fault")
        assert (fault.rank, fault.fault) == (REPORTS + 1, "protocol")
        assert "acknowledges only" in fault.text
        await client.read(Finished)


async def test_steps_go_on_when_the_reporting_rank_has_answered_and_a_rank_that_owes_is_found(
    runtime_root: Path,
) -> None:
    config = msgspec.structs.replace(STAGES, faults=msgspec.structs.replace(STAGES.faults, step_deadline_s=0.3))
    async with simulated(config, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        await client.accepted("warm", max_tokens=20)
        await client.read(Finished)
        engine.ranks[1].answer = lambda done: None
        for rank in engine.ranks.values():
            rank.beat(step=20, inside=rank.rank != 1)
        before = engine.ranks[REPORTS].steps
        await client.accepted("r", max_tokens=30)
        fault = await client.event("fault")
        assert (fault.rank, fault.fault) == (1, "wedged")
        assert "furthest behind" in fault.text
        await client.read(Finished)
        # The siblings of a replaced rank are kept and go on with it.
        assert engine.ranks[REPORTS].steps >= before + 30
        assert [rank.restarts for rank in (await client.status()).ranks] == [0, 1, 0, 0]


async def test_attention_replicas_have_rows_of_their_own_and_a_pinned_request_goes_to_its_engine_replica(
    runtime_root: Path,
) -> None:
    async with simulated(ATTENTION, runtime_root) as engine:
        client = engine.client()
        welcome = await client.welcome()
        assert welcome.info.data_parallel_size == 2
        for name in ("a", "b"):
            await client.accepted(name, max_tokens=20, dp_rank=1)
        tokens = await read_all(client, 2)
        assert sorted(tokens.values()) == [expected(0, 20, welcome.info.vocab_size)] * 2
        sampled = {rank: one.sampled for rank, one in engine.ranks.items() if one.sampled}
        assert sampled == {4: 20, 6: 20}
        status = await client.status()
        places = [(replica.dp_rank, replica.attn_rank) for replica in status.replicas]
        assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
        # The last of 20 tokens is never computed, and both prompts are gathered.
        assert status.counters["attn_dp_tokens"] == 2 * (len(PROMPT) + 19)
