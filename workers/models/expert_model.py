"""A decoder as a mixture of experts: what balancers made for vLLM ask of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import slots_per_rank
from drumline.workers.layers.expert_maps import ExpertMaps

if TYPE_CHECKING:
    from drumline.protocol.modelspec import ModelSpec
    from drumline.workers.layers import ModelGroups, MoeLayer


class ExpertModel:
    """Implements :class:`~drumline.workers.experts.MixtureOfExperts` for the MoE layers of a model or its stage.

    Numbers of slots are those of the epoch; 0 before the first one. An engine balances its models itself: this is for
    who drives a model alone.
    """

    spec: ModelSpec
    groups: ModelGroups
    moe_layers: list[MoeLayer]

    @property
    def expert_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Per MoE layer ``gate_up`` and ``down`` of :class:`~drumline.workers.layers.LocalExperts`."""
        return [(moe.experts.gate_up, moe.experts.down) for moe in self.moe_layers]

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of this stage."""
        return len(self.moe_layers)

    @property
    def num_expert_groups(self) -> int:
        """Groups that the router chooses among, 1 without any."""
        return 1 if self.spec.moe is None else self.spec.moe.num_groups

    @property
    def num_logical_experts(self) -> int:
        """Experts of a layer that a router can choose."""
        return self.spec.num_experts

    @property
    def num_routed_experts(self) -> int:
        """The same."""
        return self.spec.num_experts

    @property
    def num_shared_experts(self) -> int:
        """Experts of a layer that every token passes."""
        moe = self.spec.moe
        return 0 if moe is None else moe.shared_intermediate_size // moe.moe_intermediate_size

    @property
    def num_physical_experts(self) -> int:
        """Slots of a layer, over all ranks."""
        return len(self.moe_layers[0].routing.owner_of_slot) if self.moe_layers else 0

    @property
    def num_local_physical_experts(self) -> int:
        """Slots of a layer on this rank."""
        return len(self.moe_layers[0].experts.down) if self.moe_layers else 0

    @property
    def num_redundant_experts(self) -> int:
        """Slots of a layer beyond one for each logical expert."""
        return max(self.num_physical_experts - self.num_logical_experts, 0)

    def set_eplb_state(
        self, expert_load_view: Tensor, logical_to_physical_map: Tensor, logical_replica_count: Tensor
    ) -> None:
        """Count and route by these tensors until the next epoch; see ``MixtureOfExperts.set_eplb_state``.

        Raises InvalidConfig for other shapes or dtypes, and where ranks have channels of every expert, not whole ones.
        """
        if any(moe.sharded for moe in self.moe_layers):
            raise InvalidConfig("enable_expert_parallel", False, "True: only whole experts can be moved")
        layers, experts = self.num_moe_layers, self.num_logical_experts
        _check("expert_load_view", expert_load_view, (layers, self.num_local_physical_experts))
        _check("logical_replica_count", logical_replica_count, (layers, experts))
        _check("logical_to_physical_map", logical_to_physical_map, (layers, experts, -1))
        for layer, moe in enumerate(self.moe_layers):
            first, end = moe.routing.first_slot, moe.routing.end_slot
            maps = ExpertMaps(logical_to_physical_map[layer], logical_replica_count[layer], first, end)
            moe.routing = replace(moe.routing, maps=maps)
            moe.experts.load = expert_load_view[layer]

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        """Take ``num_physical_experts`` slots to be shared out evenly over the expert group, the first ranks one more.
        ``set_eplb_state`` is to be called after it.

        Raises InvalidConfig unless this rank's share is ``num_local_physical_experts`` and what it has memory for.
        """
        group, local = self.groups.experts, self.num_local_physical_experts
        shares = slots_per_rank(num_physical_experts, group.world_size)
        if not shares[group.rank_in_group] == num_local_physical_experts == local:
            found = f"{num_local_physical_experts} of {num_physical_experts}"
            valid = f"{local}, which this rank has, and {shares[group.rank_in_group]}, its share of them"
            raise InvalidConfig("num_local_physical_experts", found, valid)
        first = sum(shares[: group.rank_in_group])
        for moe in self.moe_layers:
            ranks = torch.arange(group.world_size, device=moe.routing.owner_of_slot.device)
            owners = ranks.repeat_interleave(torch.tensor(shares, device=ranks.device))
            moe.routing = replace(
                moe.routing, owner_of_slot=owners, first_slot=first, end_slot=first + local, maps=None
            )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(want in (-1, has) for want, has in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.is_floating_point() or tensor.is_complex():
        dims = ", ".join("any" if want == -1 else str(want) for want in shape)
        raise InvalidConfig(name, f"{tensor.dtype} {list(tensor.shape)}", f"integers ({dims})")
