"""What a model and a configuration must offer for experts to be balanced; the names of the model's are vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

from torch import Tensor


@runtime_checkable
class MixtureOfExperts(Protocol):
    """A model, or the stage of one, whose experts can be moved. :class:`~drumline.workers.models.Decoder` is one.

    ``isinstance`` looks at names alone: :func:`is_mixture_of_experts` also asks whether there are experts.
    """

    @property
    def expert_weights(self) -> Sequence[Iterable[Tensor]]:
        """Per MoE layer the tensors of this rank's experts, each (local physical experts, ...): the memory itself."""
        ...

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of this rank."""
        ...

    @property
    def num_expert_groups(self) -> int:
        """Groups of experts that the router chooses among, 1 without any."""
        ...

    @property
    def num_logical_experts(self) -> int:
        """Experts of a layer that a router can choose."""
        ...

    @property
    def num_physical_experts(self) -> int:
        """Slots of a layer, over all ranks."""
        ...

    @property
    def num_local_physical_experts(self) -> int:
        """Slots of a layer on this rank."""
        ...

    @property
    def num_routed_experts(self) -> int:
        """The same as ``num_logical_experts``: experts that tokens are routed to."""
        ...

    @property
    def num_shared_experts(self) -> int:
        """Experts of a layer that every token passes."""
        ...

    @property
    def num_redundant_experts(self) -> int:
        """Slots of a layer beyond one for each logical expert."""
        ...

    def set_eplb_state(
        self, expert_load_view: Tensor, logical_to_physical_map: Tensor, logical_replica_count: Tensor
    ) -> None:
        """Count and route by these tensors from now on.

        They are views of what a balancer owns: what it writes into them holds from the next step on, without another
        call. ``expert_load_view`` (MoE layers, local physical experts): the model adds the tokens of each slot.
        ``logical_to_physical_map`` (MoE layers, logical experts, most copies): the slots that hold an expert, -1 behind
        them. ``logical_replica_count`` (MoE layers, logical experts): how many there are, 1 or more. All integers.
        """
        ...

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        """The number of slots is another one, because ranks came or went."""
        ...


def is_mixture_of_experts(model: object) -> TypeGuard[MixtureOfExperts]:
    """Whether ``model`` is a :class:`MixtureOfExperts` and has any experts."""
    return isinstance(model, MixtureOfExperts) and model.num_moe_layers > 0


class EplbSettings(Protocol):
    """What is read of an ``EPLBConfig``."""

    @property
    def window_size(self) -> int: ...
    @property
    def step_interval(self) -> int: ...
    @property
    def num_redundant_experts(self) -> int: ...


class ParallelSettings(Protocol):
    """What is read of a ``ParallelConfig``."""

    @property
    def eplb_config(self) -> EplbSettings: ...
