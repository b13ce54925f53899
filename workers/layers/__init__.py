"""The layers that models are made of. Each holds its weights as plain tensors and is called with tensors."""

from drumline.workers.layers.attention import AttentionInputs, DecodeRows, PagedAttention, PrefillSequence
from drumline.workers.layers.experts import LocalExperts
from drumline.workers.layers.linear import Linear
from drumline.workers.layers.mlp import GatedMlp
from drumline.workers.layers.moe import ExpertExchange, LocalExchange, MoeLayer, RoutingView
from drumline.workers.layers.norm import RmsNorm
from drumline.workers.layers.parallel import ModelGroups, ParallelMlp, RowParallelLinear, VocabEmbedding, VocabHead
from drumline.workers.layers.rotary import RotaryEmbedding
from drumline.workers.layers.routing import Gate, GroupedGate, SoftmaxGate

__all__ = [
    "AttentionInputs",
    "DecodeRows",
    "ExpertExchange",
    "Gate",
    "GatedMlp",
    "GroupedGate",
    "Linear",
    "LocalExchange",
    "LocalExperts",
    "ModelGroups",
    "MoeLayer",
    "PagedAttention",
    "ParallelMlp",
    "PrefillSequence",
    "RmsNorm",
    "RotaryEmbedding",
    "RoutingView",
    "RowParallelLinear",
    "SoftmaxGate",
    "VocabEmbedding",
    "VocabHead",
]
