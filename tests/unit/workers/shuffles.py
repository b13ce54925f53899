"""Random placements of experts whose bytes are known, and groups that count what travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.messages import I32Matrix
from tests.parity.threadgroup import ThreadMember

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
SHAPES = ((3, 4), (5,), ())


def expert_parts(layer: int, expert: int) -> list[Tensor]:
    """The tensors of one expert of a layer, of several dtypes and shapes; a canary, which names it, comes last."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    parts = [
        torch.randint(0, 256, (int(np.prod(shape)) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        .view(dtype)
        .view(shape)
        for dtype in DTYPES
        for shape in SHAPES
    ]
    return [*parts, torch.tensor(layer * 2**32 + expert)]


EXPERT_BYTES = sum(part.nbytes for part in expert_parts(0, 0))


def rank_weights(held: I32Matrix) -> list[list[Tensor]]:
    """Per layer the tensors of a rank with these experts in its slots, int32 (layers, slots); -1: noise."""
    layers = []
    for layer, slots in enumerate(held.tolist()):
        parts = [expert_parts(layer, 10**6 if expert < 0 else expert) for expert in slots]
        like = expert_parts(0, 0)
        layers.append(
            [
                torch.stack(same) if parts else like[number].new_empty(0, *like[number].shape)
                for number, same in enumerate(zip(*parts, strict=True))
            ]
            if parts
            else [part.new_empty(0, *part.shape) for part in like]
        )
    return layers


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal byte for byte, whatever numbers that makes."""
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def check_held(weights: Sequence[Sequence[Tensor]], wanted: I32Matrix) -> None:
    """Every slot holds what it is to hold, bit for bit; ``wanted``: int32 (layers, slots) of the rank, -1: any."""
    for layer, slots in enumerate(wanted.tolist()):
        for slot, expert in enumerate(slots):
            if expert >= 0:
                for found, expected in zip(weights[layer], expert_parts(layer, expert), strict=True):
                    assert same_bits(found[slot], expected), (layer, slot, expert, found.dtype)


def random_placement(draw: np.random.Generator, layers: int, experts: int, width: int, holes: float) -> I32Matrix:
    """int32 (layers, width): every expert somewhere, copies of some, holes (-1) among the rest."""
    rows = []
    for _ in range(layers):
        more = draw.integers(0, experts, width - experts)
        more[draw.random(width - experts) < holes] = -1
        rows.append(draw.permutation(np.concatenate([np.arange(experts), more])))
    return np.asarray(rows, dtype=np.int32)


def least_bytes(old: I32Matrix, new: I32Matrix, slots: Sequence[int]) -> int:
    """Bytes of each expert that a rank needs and has nowhere, once."""
    bounds = np.cumsum([0, *slots])
    needed = 0
    for before, after in zip(old, new, strict=True):
        for first, end in pairwise(bounds.tolist()):
            needed += len(set(after[first:end].tolist()) - set(before[first:end].tolist()) - {-1})
    return needed * EXPERT_BYTES


@dataclass
class CountingMember:
    """A member of a group of threads that counts the bytes that it sends, and checks that messages of one rank are
    answered for before the next rank gets any."""

    member: ThreadMember
    sent: int = 0
    unanswered: set[int] = field(default_factory=set)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.member, name)

    def isend(self, t: Tensor, dst: int) -> Any:
        assert self.unanswered <= {dst}
        self.unanswered.add(dst)
        self.sent += t.nbytes
        return _Counted(self, self.member.isend(t, dst))


@dataclass
class _Counted:
    owner: CountingMember
    send: Any

    def wait(self) -> None:
        self.send.wait()
        self.owner.unanswered.clear()
