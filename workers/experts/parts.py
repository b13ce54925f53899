"""An expert on its way: cut into parts that are bytes, the last one with its canary."""

from __future__ import annotations

import torch
from torch import Tensor

from drumline.workers.experts.expert_layer import ExpertWeights

CANARY_BYTES = 8


def part_bounds(nbytes: int, parts: int, part: int) -> tuple[int, int]:
    """Which bytes of ``nbytes`` part number ``part`` of ``parts`` has."""
    return nbytes * part // parts, nbytes * (part + 1) // parts


def expert_bytes(weights: ExpertWeights) -> int:
    """Bytes of one expert."""
    return weights[0].nbytes + weights[1].nbytes


def part_size(weights: ExpertWeights, parts: int, part: int) -> int:
    """Bytes of the message of one part."""
    first, end = part_bounds(expert_bytes(weights), parts, part)
    return end - first + (CANARY_BYTES if part == parts - 1 else 0)


def _pieces(weights: ExpertWeights, first: int, end: int) -> list[Tensor]:
    """uint8 views of bytes ``first`` to ``end`` of both tensors, one behind the other."""
    gate_up, down = (tensor.view(-1).view(torch.uint8) for tensor in weights)
    bound = len(gate_up)
    pieces = [gate_up[min(first, bound) : min(end, bound)], down[max(first - bound, 0) : max(end - bound, 0)]]
    return [piece for piece in pieces if len(piece)]


def cut_part(weights: ExpertWeights, parts: int, part: int, canary: int) -> Tensor:
    """uint8 (bytes,): the message of one part."""
    pieces = _pieces(weights, *part_bounds(expert_bytes(weights), parts, part))
    if part == parts - 1:
        tail = torch.tensor([canary], dtype=torch.int64, device=weights[0].device)
        pieces.append(tail.view(torch.uint8))
    return torch.cat(pieces)


def put_part(weights: ExpertWeights, parts: int, part: int, message: Tensor) -> int | None:
    """Write one part where it belongs. Returns the canary that came with it, None before the last part."""
    at = 0
    for piece in _pieces(weights, *part_bounds(expert_bytes(weights), parts, part)):
        piece.copy_(message[at : at + len(piece)])
        at += len(piece)
    if part != parts - 1:
        return None
    return int(message[at:].clone().view(torch.int64).item())
