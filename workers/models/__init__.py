"""The models that drumline computes, by the architecture name of their config."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import ModelSpec
from drumline.workers.models.decoder import Decoder, ModelPlacement, StepContext
from drumline.workers.models.llama import build_llama
from drumline.workers.models.qwen3 import build_qwen3
from drumline.workers.models.qwen3_moe import build_qwen3_moe

__all__ = ["ARCHITECTURES", "Decoder", "ModelPlacement", "StepContext", "build_model"]

ARCHITECTURES: Mapping[str, Callable[[ModelSpec, ModelPlacement], Decoder]] = {
    "LlamaForCausalLM": build_llama,
    "Qwen3ForCausalLM": build_qwen3,
    "Qwen3MoeForCausalLM": build_qwen3_moe,
}


def build_model(spec: ModelSpec, placement: ModelPlacement) -> Decoder:
    """The model of ``spec`` with its weights allocated and not yet loaded. Raises InvalidConfig."""
    build = ARCHITECTURES.get(spec.architecture)
    if build is None:
        raise InvalidConfig("architectures", spec.architecture, "one of " + ", ".join(ARCHITECTURES))
    return build(spec, placement)
