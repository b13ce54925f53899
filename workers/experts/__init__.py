"""Experts over ranks: the exchange of tokens with the ranks that hold their experts, and how experts move.

For those who come from vLLM the names of its load balancer are here, with the shapes that they know.
"""

from drumline.workers.experts.eplb_state import EplbState
from drumline.workers.experts.protocols import MixtureOfExperts, is_mixture_of_experts
from drumline.workers.experts.rearrange import rearrange_expert_weights_inplace

__all__ = ["EplbState", "MixtureOfExperts", "is_mixture_of_experts", "rearrange_expert_weights_inplace"]
