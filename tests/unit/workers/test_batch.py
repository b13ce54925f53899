"""The batch table follows the rules of ``Step``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Admit, SamplingSpec, Step
from drumline.workers.batch import BatchTable, StepRows

BLOCK = 4


def int32(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def step(**parts: Any) -> Step:
    empty: dict[str, Any] = {
        "evicted": int32(),
        "admitted": (),
        "append_rows": int32(),
        "append_blocks": int32(),
        "prefill_rows": int32(),
        "prefill_counts": int32(),
    }
    return Step(term=1, epoch=1, wave=1, step=1, num_tokens_across_dp=int32(0), **(empty | parts))


def admit(row: int, length: int, blocks: list[int], num_cached: int = 0, prompt_len: int = 0) -> Admit:
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    return Admit(row, tokens, prompt_len or length, num_cached, int32(*blocks), SamplingSpec())


@pytest.fixture
def table() -> BatchTable:
    return BatchTable(4, 32, num_blocks=20, block_size=BLOCK, vocab_size=200, device=torch.device("cpu"))


def run(table: BatchTable, this: Step, *sampled: int) -> StepRows:
    plan = table.apply(this)
    table.advance(plan, torch.tensor(sampled) if sampled else None)
    return plan


def test_a_prompt_is_computed_in_the_chunks_that_are_named(table: BatchTable) -> None:
    plan = table.apply(step(admitted=(admit(2, 6, [7, 3]),), prefill_rows=int32(2), prefill_counts=int32(4)))
    assert (plan.num_decode, plan.rows.tolist(), plan.counts.tolist()) == (0, [2], [4])
    assert plan.positions.tolist() == [0, 1, 2, 3]
    assert plan.slots.tolist() == [28, 29, 30, 31]
    assert table.input_ids(plan).tolist() == [100, 101, 102, 103]
    assert plan.sampling.tolist() == []
    table.advance(plan, None)

    # In prefill and not named: it computes nothing.
    plan = table.apply(step())
    assert plan.num_tokens == 0

    plan = table.apply(step(prefill_rows=int32(2), prefill_counts=int32(2)))
    assert plan.slots.tolist() == [12, 13]
    assert table.input_ids(plan).tolist() == [104, 105]
    assert plan.sampling_rows.tolist() == [2]
    assert plan.last_tokens.tolist() == [1]


def test_after_its_first_token_a_row_decodes_unnamed(table: BatchTable) -> None:
    first = step(admitted=(admit(1, 3, [5]),), prefill_rows=int32(1), prefill_counts=int32(3))
    run(table, first, 42)
    plan = table.apply(step())
    assert (plan.num_decode, plan.rows.tolist(), plan.positions.tolist()) == (1, [1], [3])
    assert plan.slots.tolist() == [5 * BLOCK + 3]
    assert table.input_ids(plan).tolist() == [42]
    table.advance(plan, torch.tensor([43]))
    plan = table.apply(step(append_rows=int32(1), append_blocks=int32(9)))
    assert plan.slots.tolist() == [9 * BLOCK]
    assert table.input_ids(plan).tolist() == [43]


def test_a_row_admitted_with_all_but_one_token_cached_waits_to_be_named(table: BatchTable) -> None:
    plan = table.apply(step(admitted=(admit(0, 6, [2, 4], num_cached=5, prompt_len=3),)))
    assert plan.num_tokens == 0
    plan = table.apply(step(prefill_rows=int32(0), prefill_counts=int32(1)))
    assert table.input_ids(plan).tolist() == [105]
    assert plan.sampling_rows.tolist() == [0]
    # Three tokens were generated before it was admitted again: positions count from the end of the prompt.
    assert table.sampling_rows(plan).position.tolist() == [3]


def test_decodes_come_first_and_samples_are_in_row_order(table: BatchTable) -> None:
    run(table, step(admitted=(admit(2, 2, [1]),), prefill_rows=int32(2), prefill_counts=int32(2)), 50)
    both = (admit(3, 5, [2, 3]), admit(0, 2, [4]))
    plan = table.apply(step(admitted=both, prefill_rows=int32(3, 0), prefill_counts=int32(4, 2)))
    assert plan.rows.tolist() == [2, 3, 0]
    assert table.input_ids(plan).tolist() == [50, 100, 101, 102, 103, 100, 101]
    assert plan.sampling_rows.tolist() == [0, 2]
    assert plan.last_tokens.tolist() == [6, 0]


def test_a_decoding_row_that_is_named_with_zero_waits(table: BatchTable) -> None:
    run(table, step(admitted=(admit(1, 3, [5]),), prefill_rows=int32(1), prefill_counts=int32(3)), 42)
    plan = run(table, step(prefill_rows=int32(1), prefill_counts=int32(0)))
    assert plan.num_tokens == 0
    plan = table.apply(step(prefill_rows=int32(1), prefill_counts=int32(1)))
    assert (plan.num_decode, table.input_ids(plan).tolist()) == (1, [42])


def test_a_row_may_be_appended_to_several_times_in_one_step(table: BatchTable) -> None:
    admitted = (admit(0, 9, [1]), admit(1, 9, [2]))
    appended = step(admitted=admitted, append_rows=int32(0, 1, 0, 1), append_blocks=int32(5, 6, 7, 8))
    table.apply(appended)
    assert table.block_table[0, :3].tolist() == [1, 5, 7]
    assert table.block_table[1, :3].tolist() == [2, 6, 8]


def test_a_row_is_evicted_and_admitted_anew_in_one_step(table: BatchTable) -> None:
    run(table, step(admitted=(admit(1, 3, [5]),), prefill_rows=int32(1), prefill_counts=int32(3)), 42)
    again = step(evicted=int32(1), admitted=(admit(1, 2, [6]),), prefill_rows=int32(1), prefill_counts=int32(2))
    plan = table.apply(again)
    assert plan.slots.tolist() == [24, 25]
    assert plan.num_decode == 0


def test_history_is_read_through_the_block_table(table: BatchTable) -> None:
    paged = torch.full((80,), 77, dtype=torch.int32)
    plan = table.apply(
        step(admitted=(admit(0, 6, [7, 3], prompt_len=4),), prefill_rows=int32(0), prefill_counts=int32(6))
    )
    paged[torch.from_numpy(plan.slots)] = table.input_ids(plan).int()
    history = table.history(np.array([0]), paged)
    assert history.tokens[history.known].tolist() == [100, 101, 102, 103, 104, 105]
    assert history.tokens[history.generated].tolist() == [104, 105]


def test_reset_forgets_every_row(table: BatchTable) -> None:
    run(table, step(admitted=(admit(1, 3, [5]),), prefill_rows=int32(1), prefill_counts=int32(3)), 42)
    table.reset()
    plan = table.apply(step())
    assert plan.num_tokens == 0
    with pytest.raises(ProtocolError, match="empty"):
        table.apply(step(evicted=int32(1)))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"evicted": int32(4)}, "0 to 3"),
        ({"evicted": int32(-1)}, "0 to 3"),
        ({"evicted": int32(2)}, "empty"),
        ({"admitted": (admit(4, 2, [1]),)}, "row 4"),
        ({"admitted": (admit(0, 0, [1]),)}, "0 tokens"),
        ({"admitted": (admit(0, 33, [1]),)}, "33 tokens"),
        ({"admitted": (admit(0, 3, [1], num_cached=3),)}, "3 cached"),
        ({"admitted": (admit(0, 9, [1], num_cached=5),)}, "1 blocks and 5 cached"),
        ({"admitted": (admit(0, 3, [1], prompt_len=4),)}, "prompt of 4"),
        ({"admitted": (admit(0, 3, [20]),)}, "0 to 19"),
        ({"admitted": (admit(0, 3, [0] * 9),)}, "9 blocks"),
        ({"admitted": (Admit(0, int32(5, 200), 2, 0, int32(1), SamplingSpec()),)}, "0 to 199"),
        ({"append_rows": int32(0), "append_blocks": int32(1)}, "empty"),
        ({"append_rows": int32(0), "append_blocks": int32(1, 2)}, "2 appended"),
        (
            {"admitted": (admit(0, 3, [1]),), "append_rows": int32(*[0] * 8), "append_blocks": int32(*[1] * 8)},
            "8 blocks",
        ),
        ({"prefill_rows": int32(1), "prefill_counts": int32(1)}, "empty"),
        ({"prefill_rows": int32(1), "prefill_counts": int32()}, "1 prefill rows with 0"),
        ({"admitted": (admit(0, 3, [1]),), "prefill_rows": int32(0), "prefill_counts": int32(4)}, "valid: 0 to 3"),
        ({"admitted": (admit(0, 3, [1]),), "prefill_rows": int32(0), "prefill_counts": int32(-1)}, "valid: 0 to 3"),
        ({"admitted": (admit(0, 3, [1]),), "prefill_rows": int32(0, 0), "prefill_counts": int32(1, 1)}, "twice"),
        (
            {"admitted": (admit(0, 6, [1]),), "prefill_rows": int32(0), "prefill_counts": int32(6)},
            "token 6 with 1 blocks",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_its_figures(
    table: BatchTable, parts: dict[str, Any], text: str
) -> None:
    with pytest.raises(ProtocolError, match=text):
        table.apply(step(**parts))
