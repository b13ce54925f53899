"""The load balancer as users of vLLM know it: it counts, and every so many steps it moves everything at once.

For models that one drives oneself. An engine of ours counts and plans in the coordinator, moves experts while steps
run, and uses none of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.placement import PlacementMaps
from drumline.protocol.rebalance import rebalance_experts
from drumline.workers.experts.process_group import AnyGroup, ExpertGroup, expert_group
from drumline.workers.experts.protocols import MixtureOfExperts, ParallelSettings
from drumline.workers.experts.rearrange import rearrange_expert_weights_inplace

log = logging.getLogger(__name__)

_Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Policy: TypeAlias = Callable[[Any, int, int, int, int], tuple[Any, Any, Any]]
"""Arguments and results of ``rebalance_experts``; the same on every rank that asks with the same arguments."""


@dataclass
class EplbState:
    """Loads, placement and progress of one model's balancing, the same on every rank but for the loads.

    Attributes:
        physical_to_logical_map: int64 (MoE layers, physical experts), the logical expert of each slot.
        logical_to_physical_map: int64 (MoE layers, logical experts, redundant experts + 1), the slots that hold an
            expert, -1 behind them. The model reads it and the next one in every step.
        logical_replica_count: int64 (MoE layers, logical experts).
        expert_load_pass: int64 (MoE layers, local physical experts), tokens of this step; the model adds to it.
        expert_load_window: int64 (window, MoE layers, local physical experts), those of the last steps that were no
            dummies, under the placement that stands.
        expert_load_window_step: the row of the window that the next step fills.
        expert_rearrangement_step: steps since the last rearrangement; at ``expert_rearrangement_step_interval`` comes
            the next. It is the same on every rank, as every rank calls :meth:`step` equally often.
        ep_group: the ranks that hold the experts; ``slots``: how many slots each has; ``num_nodes``: on how many nodes
            they are; ``policy``: what plans.
    """

    physical_to_logical_map: Tensor
    logical_to_physical_map: Tensor
    logical_replica_count: Tensor
    expert_load_pass: Tensor
    expert_load_window: Tensor
    expert_load_window_step: int = 0
    expert_load_window_size: int = 0
    expert_rearrangement_step: int = 0
    expert_rearrangement_step_interval: int = 0
    ep_group: AnyGroup = field(kw_only=True)
    slots: tuple[int, ...] = field(kw_only=True)
    num_nodes: int = field(default=1, kw_only=True)
    policy: Policy = field(default=rebalance_experts, kw_only=True)

    @staticmethod
    def build_initial_global_physical_to_logical_map(num_routed_experts: int, num_redundant_experts: int) -> list[int]:
        """Slot by slot: all experts, then copies of the first ones, round and round."""
        return [*range(num_routed_experts), *(slot % num_routed_experts for slot in range(num_redundant_experts))]

    @classmethod
    def build(
        cls,
        model: MixtureOfExperts,
        device: torch.device,
        parallel_config: ParallelSettings,
        global_expert_load: Tensor | None = None,
        old_global_expert_indices: Tensor | None = None,
        rank_mapping: Mapping[int, int] | None = None,
        *,
        ep_group: AnyGroup,
        slots: Sequence[int] | None = None,
        num_nodes: int | None = None,
        policy: Policy = rebalance_experts,
    ) -> EplbState:
        """The state of a model that holds experts, and ``model.set_eplb_state`` with it. All ranks call it.

        Args:
            parallel_config: its ``eplb_config`` gives the window, the interval and the redundant experts.
            global_expert_load: (MoE layers, logical experts), on which to rearrange at once.
            old_global_expert_indices: (MoE layers, physical experts), what the slots hold now; None: the initial map.
                After ranks have come or gone it is what the old ranks held, and ``rank_mapping`` says which those are
                now (see :func:`~drumline.workers.experts.rearrange_expert_weights_inplace`); a load is needed then.
            ep_group: as there. ``slots``: how many slots each of its ranks has; None: shared out evenly.
            num_nodes: None: what the group knows, else 1.

        Raises InvalidConfig for a model, a configuration and a map that do not fit each other.
        """
        settings = parallel_config.eplb_config
        if model.num_redundant_experts != settings.num_redundant_experts:
            found, valid = settings.num_redundant_experts, f"{model.num_redundant_experts}, which the model has"
            raise InvalidConfig("num_redundant_experts", found, valid)
        if rank_mapping is not None and global_expert_load is None:
            raise InvalidConfig("global_expert_load", None, "a load to plan on where ranks have come or gone")
        group = expert_group(ep_group, device)
        old = _initial(model, device) if old_global_expert_indices is None else old_global_expert_indices.to(device)
        nodes = getattr(group, "node_count", 1) if num_nodes is None else num_nodes
        share = _checked_slots(model, group, slots)
        state = cls(
            *_empty(model, device, settings.window_size),
            expert_load_window_size=settings.window_size,
            # The first rearrangement comes after a quarter of the interval.
            expert_rearrangement_step=settings.step_interval - settings.step_interval // 4,
            expert_rearrangement_step_interval=settings.step_interval,
            ep_group=ep_group,
            slots=share,
            num_nodes=nodes,
            policy=policy,
        )
        load = torch.ones_like(state.logical_replica_count) if global_expert_load is None else global_expert_load
        # Also without a load: what cannot be planned is to be known now, not when the first interval is over.
        new = state._planned(model, load, range(group.world_size))
        if global_expert_load is None:
            state._adopt(old)
        else:
            rearrange_expert_weights_inplace(
                old, new, model.expert_weights, ep_group, rank_mapping=rank_mapping, slots=share
            )
            state._adopt(new)
            state.expert_rearrangement_step = 0
        model.set_eplb_state(state.expert_load_pass, state.logical_to_physical_map, state.logical_replica_count)
        return state

    def step(
        self, model: MixtureOfExperts, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False
    ) -> None:
        """Called by every rank after each step of the model.

        ``is_dummy``: the step's tokens do not count. ``is_profile``: take the memory that a rearrangement takes, and
        nothing else. ``log_stats``: log, on the first rank, avg_tokens (the mean over ranks, summed over layers),
        max_tokens (the most of any rank, summed over layers) and balancedness, the one over the other; this is a
        collective and waits for the device. When the interval is over experts are rearranged, dummy or not: all ranks
        must take part.

        Errors are those of the group and of the policy.
        """
        if is_profile:
            self.rearrange(model, is_profile=True)
            return
        if is_dummy:
            self.expert_load_pass.zero_()
        if log_stats:
            self._log_balance()
        if not is_dummy:
            self.expert_load_window[self.expert_load_window_step] = self.expert_load_pass
            self.expert_load_window_step = (self.expert_load_window_step + 1) % self.expert_load_window_size
            self.expert_load_pass.zero_()
        self.expert_rearrangement_step += 1
        if self.expert_rearrangement_step >= self.expert_rearrangement_step_interval:
            self.expert_rearrangement_step = 0
            self.rearrange(model)

    def rearrange(
        self,
        model: MixtureOfExperts,
        is_profile: bool = False,
        execute_shuffle: bool = True,
        global_expert_load: Tensor | None = None,
        rank_mapping: Mapping[int, int] | None = None,
    ) -> Tensor | None:
        """Plan on the load of all ranks and move the experts, weights and maps, on all ranks at once.

        ``global_expert_load``: (MoE layers, logical experts), to plan on instead. Without ``execute_shuffle`` nothing
        moves, and the load of the window is returned: int64 (MoE layers, logical experts), the same on every rank.
        ``rank_mapping``: ranks of the group are about to go (-1); those that stay get all experts, and
        ``physical_to_logical_map`` becomes that of the new ranks. The model is not told: it wants a state built over
        the group that is left.
        """
        if is_profile:
            standing = self.physical_to_logical_map
            rearrange_expert_weights_inplace(
                standing, standing, model.expert_weights, self.ep_group, is_profile=True, slots=self.slots
            )
            return None
        load = self._global_load(model) if global_expert_load is None else global_expert_load
        if not execute_shuffle:
            return load
        staying: Sequence[int] = range(len(self.slots))
        if rank_mapping is not None:
            if len(rank_mapping) != len(self.slots):
                found, valid = (
                    dict(rank_mapping),
                    f"an entry for each of {len(self.slots)} ranks; else build a new state",
                )
                raise InvalidConfig("rank_mapping", found, valid)
            staying = [rank for rank in staying if rank_mapping.get(rank, -1) >= 0]
        new = self._planned(model, load, staying)
        rearrange_expert_weights_inplace(
            self.physical_to_logical_map,
            new,
            model.expert_weights,
            self.ep_group,
            rank_mapping=rank_mapping,
            slots=self.slots,
        )
        if rank_mapping is None:
            self._adopt(new)
        else:
            self.physical_to_logical_map = new.to(self.physical_to_logical_map)
        # Loads of slots that hold something else now would be taken for loads of that.
        self.expert_load_window.zero_()
        self.expert_load_window_step = 0
        return None

    # ------------------------------------------------------------------------------------------------------------ parts

    @property
    def _group(self) -> ExpertGroup:
        return expert_group(self.ep_group, self.expert_load_pass.device)

    def _planned(self, model: MixtureOfExperts, load: Tensor, ranks: Sequence[int]) -> Tensor:
        """int64 (MoE layers, physical experts) for these ranks of the group, with as many slots as they have now."""
        num_ranks, num_slots = len(ranks), sum(self.slots[rank] for rank in ranks)
        nodes = self.num_nodes if num_ranks % self.num_nodes == 0 else 1
        if nodes != self.num_nodes:
            log.warning("%d ranks do not divide by %d nodes: planned as if on one", num_ranks, self.num_nodes)
        new, _, _ = self.policy(load.cpu().numpy(), num_slots, model.num_expert_groups, nodes, num_ranks)
        return torch.as_tensor(np.asarray(new), dtype=torch.int64)

    def _adopt(self, placement: Tensor) -> None:
        """Write the maps of ``placement`` over those that the model reads."""
        experts = self.logical_replica_count.shape[1]
        maps = PlacementMaps.build(placement.cpu().numpy(), experts, len(self.slots), self.slots)
        copies = np.full(self.logical_to_physical_map.shape, -1, dtype=np.int64)
        copies[:, :, : maps.logical_to_physical.shape[2]] = maps.logical_to_physical
        self.physical_to_logical_map.copy_(placement)
        self.logical_to_physical_map.copy_(torch.from_numpy(copies))
        self.logical_replica_count.copy_(torch.from_numpy(maps.logical_replica_count.astype(np.int64)))

    def _global_load(self, model: MixtureOfExperts) -> Tensor:
        """Tokens of each logical expert on all ranks within the window, int64 (MoE layers, logical experts)."""
        own = self.expert_load_window.sum(0)
        by_slot = self._group.all_gather_rows(own.t().contiguous(), self.slots).t()
        load = torch.zeros_like(self.logical_replica_count)
        return load.scatter_add_(1, self.physical_to_logical_map, by_slot)

    def _log_balance(self) -> None:
        group = self._group
        own = self.expert_load_pass.sum(1).view(1, -1)
        by_rank = group.all_gather_rows(own, [1] * group.world_size).double()
        if group.rank_in_group:
            return
        avg_tokens, max_tokens = torch.stack([by_rank.mean(0).sum(), by_rank.amax(0).sum()]).tolist()
        balancedness = avg_tokens / max_tokens if max_tokens else 0.0
        text = "EPLB step: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f"
        log.info(text, avg_tokens, max_tokens, balancedness)


def _initial(model: MixtureOfExperts, device: torch.device) -> Tensor:
    layer = EplbState.build_initial_global_physical_to_logical_map(
        model.num_routed_experts, model.num_redundant_experts
    )
    return torch.tensor(layer, dtype=torch.int64, device=device).expand(model.num_moe_layers, -1)


def _empty(model: MixtureOfExperts, device: torch.device, window_size: int) -> _Tensors:
    """The tensors of a state, in its order, without a placement and without loads."""
    layers, experts, local = model.num_moe_layers, model.num_logical_experts, model.num_local_physical_experts

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    maps = zeros(layers, model.num_physical_experts), zeros(layers, experts, model.num_redundant_experts + 1)
    return *maps, zeros(layers, experts), zeros(layers, local), zeros(window_size, layers, local)


def _checked_slots(model: MixtureOfExperts, group: ExpertGroup, slots: Sequence[int] | None) -> tuple[int, ...]:
    """How many slots each rank of the group has."""
    total, local, size = model.num_physical_experts, model.num_local_physical_experts, group.world_size
    share = slots_per_rank(total, size) if slots is None else tuple(slots)
    if len(share) != size or sum(share) != total or share[group.rank_in_group] != local:
        valid = f"{size} numbers that add up to {total}, {local} for rank {group.rank_in_group}, as the model has them"
        raise InvalidConfig("slots", list(share), valid)
    return share
