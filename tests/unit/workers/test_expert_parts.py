"""An expert that is cut into parts and put together again is the same, byte for byte."""

from __future__ import annotations

import pytest
import torch

from drumline.workers.experts.parts import CANARY_BYTES, cut_part, expert_bytes, part_size, put_part
from tests.unit.workers.staged_worlds import expert, is_expert

CANARY = 3 * 2**32 + 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 36])
def test_all_parts_make_the_expert_and_the_last_one_brings_its_canary(parts: int, dtype: torch.dtype) -> None:
    source = expert(0, 3, dtype)
    target = torch.zeros_like(source[0]), torch.zeros_like(source[1])
    sent = 0
    for part in range(parts):
        message = cut_part(source, parts, part, CANARY)
        assert (message.dtype, message.nbytes) == (torch.uint8, part_size(target, parts, part))
        assert message.nbytes <= -(-expert_bytes(source) // parts) + CANARY_BYTES
        sent += message.nbytes
        assert put_part(target, parts, part, message) == (CANARY if part == parts - 1 else None)
    assert is_expert(target, 0, 3)
    assert sent == expert_bytes(source) + CANARY_BYTES


def test_a_part_is_a_copy_that_outlives_what_it_was_cut_from() -> None:
    source = tuple(part.clone() for part in expert(0, 3, torch.float32))
    message = cut_part((source[0], source[1]), 1, 0, CANARY)
    for part in source:
        part.zero_()
    target = torch.empty_like(source[0]), torch.empty_like(source[1])
    put_part(target, 1, 0, message)
    assert is_expert(target, 0, 3)
