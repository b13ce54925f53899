"""Qwen3: a dense decoder that normalises the queries and keys of each head."""

from __future__ import annotations

from drumline.protocol.modelspec import ModelSpec
from drumline.workers.models.decoder import Decoder, ModelPlacement, dense_mlp


def build_qwen3(spec: ModelSpec, placement: ModelPlacement) -> Decoder:
    """The model, its weights allocated and not yet loaded."""
    return Decoder(spec, placement, qk_norm=True, mlp=dense_mlp)
