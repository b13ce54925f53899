"""Llama: a dense decoder. Rotary scaling, biases and tied embeddings are the spec's."""

from __future__ import annotations

from drumline.protocol.modelspec import ModelSpec
from drumline.workers.models.decoder import Decoder, ModelPlacement, dense_mlp


def build_llama(spec: ModelSpec, placement: ModelPlacement) -> Decoder:
    """The model, its weights allocated and not yet loaded."""
    return Decoder(spec, placement, qk_norm=False, mlp=dense_mlp)
