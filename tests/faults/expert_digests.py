"""Mixed into ranks: what really stands in the memory that each expert slot computes with."""

from __future__ import annotations

import zlib

from drumline.workers.model_runner import ModelRunner


class ExpertDigests:
    """``self`` is a :class:`drumline.workers.Worker` too."""

    model_runner: ModelRunner

    def expert_digests(self) -> list[tuple[int, list[int]]]:
        """For each MoE layer of the stage: its number, and a checksum of the weights of each slot."""
        return [
            (layer.number, [_digest(layer.weights(slot)) for slot in range(layer.num_slots)])
            for layer in self.model_runner.experts.layers
        ]


def _digest(weights: tuple[object, ...]) -> int:
    digest = 0
    for part in weights:
        digest = zlib.crc32(part.contiguous().numpy().tobytes(), digest)  # type: ignore[attr-defined]
    return digest
