"""The layers that models are made of. Each holds its weights as plain tensors and is called with tensors."""

from drumline.workers.layers.attention import AttentionInputs, DecodeRows, PagedAttention, PrefillSequence
from drumline.workers.layers.embedding import Embedding
from drumline.workers.layers.linear import Linear
from drumline.workers.layers.mlp import GatedMlp
from drumline.workers.layers.moe import ExpertExchange, LocalExchange, MoeLayer, RoutingView
from drumline.workers.layers.norm import RmsNorm
from drumline.workers.layers.rotary import RotaryEmbedding

__all__ = [
    "AttentionInputs",
    "DecodeRows",
    "Embedding",
    "ExpertExchange",
    "GatedMlp",
    "Linear",
    "LocalExchange",
    "MoeLayer",
    "PagedAttention",
    "PrefillSequence",
    "RmsNorm",
    "RotaryEmbedding",
    "RoutingView",
]
