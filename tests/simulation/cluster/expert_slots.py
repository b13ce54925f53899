"""What the ranks of an epoch hold of the experts, and what Configure has them fetch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from drumline.protocol.layout import Layout, slots_per_rank
from drumline.protocol.messages import Configure, I32Matrix
from tests.simulation.cluster.rank_layer import no_spare
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.rank import SimRank

CHECKPOINT = -1
EMPTY_SLOT = -1


class ExpertSlots:
    """The expert slots of one epoch of a MoE model with expert parallel. ``layout`` is that of its members.

    Raises :class:`RuleBrokenError` for a placement that leaves an expert out, or has slots that do not add up.
    """

    def __init__(self, configure: Configure, layout: Layout, stage_of_layer: Sequence[int], num_experts: int) -> None:
        self.configure = configure
        self._layout = layout
        self._stages = stage_of_layer
        placement = configure.placement
        slots = configure.slots.tolist() if len(configure.slots) else slots_per_rank(placement.shape[1], layout.ep_size)
        if len(slots) != layout.ep_size or sum(slots) != placement.shape[1] or min(slots) < 0:
            raise RuleBrokenError(f"{slots} slots of {layout.ep_size} ranks in a placement of {placement.shape}")
        if placement.shape[0] != len(stage_of_layer):
            raise RuleBrokenError(f"a placement of {placement.shape} for {len(stage_of_layer)} layers")
        self.bounds = [0, *np.cumsum(slots).tolist()]
        for layer, row in enumerate(placement.tolist()):
            if set(row) != set(range(num_experts)):
                raise RuleBrokenError(f"layer {layer} is placed as {row}, of {num_experts} experts")

    def wanted(self, place: int) -> I32Matrix:
        """int32 (moe_layers, slots): what the member at ``place`` is to hold; -1 in layers of other stages."""
        return self.share(self.configure.placement, place)

    def share(self, placement: I32Matrix, place: int) -> I32Matrix:
        """What of ``placement``, int32 (moe_layers, all slots), is in the slots of the member at ``place``."""
        ep_rank, stage = self._layout.ep_rank(place), self._layout.coordinates(place).pp_rank
        share = placement[:, self.bounds[ep_rank] : self.bounds[ep_rank + 1]].copy()
        for layer, of_layer in enumerate(self._stages):
            if of_layer != stage:
                share[layer] = EMPTY_SLOT
        return share

    def layers_of(self, place: int) -> list[int]:
        """The layers of the stage of the member at ``place``."""
        stage = self._layout.coordinates(place).pp_rank
        return [layer for layer, of_layer in enumerate(self._stages) if of_layer == stage]

    def places_of(self, layer: int) -> list[int]:
        """The places of the members that hold ``layer``."""
        tp_size, stage = self._layout.tensor_parallel_size, self._stages[layer]
        places = [divmod(ep_rank, tp_size) for ep_rank in range(self._layout.ep_size)]
        return [self._layout.global_rank(dp_rank, stage, tp_rank) for dp_rank, tp_rank in places]

    def receiver(self, layer: int, slot: int) -> tuple[int, int]:
        """(place, its own slot) of the member that has physical ``slot`` of ``layer``."""
        ep_rank = int(np.searchsorted(self.bounds, slot, side="right")) - 1
        dp_rank, tp_rank = divmod(ep_rank, self._layout.tensor_parallel_size)
        place = self._layout.global_rank(dp_rank, self._stages[layer], tp_rank)
        return place, slot - self.bounds[ep_rank]

    def travellers(self) -> set[int]:
        """The global ranks that send or receive experts of another rank."""
        members = self.configure.members
        ranks: set[int] = set()
        for layer, slot, source, _ in self.configure.fetches.tolist():
            receiver = members[self.receiver(layer, slot)[0]].rank
            if source not in (CHECKPOINT, receiver):
                ranks |= {source, receiver}
        return ranks

    def fit(self, held: I32Matrix, place: int) -> I32Matrix:
        """``held`` of a member with as many slots as it has in this epoch: more, or fewer."""
        count = self.bounds[self._layout.ep_rank(place) + 1] - self.bounds[self._layout.ep_rank(place)]
        fitted = np.full((len(self._stages), count), EMPTY_SLOT, dtype=np.int32)
        kept = min(count, held.shape[1])
        fitted[:, :kept] = held[:, :kept]
        return fitted

    def carry_out(self, ranks: dict[int, SimRank]) -> None:
        """Every fetch in order, each from a slot, or a spare, that really holds what is wanted; from the checkpoint
        only what nobody has. ``ranks``: all that are in the epoch, by global rank. Spares are gone afterwards."""
        members = self.configure.members
        before = {rank: np.hstack([process.held, process.spare]) for rank, process in ranks.items()}
        for place, member in enumerate(members):
            ranks[member.rank].held = self.fit(ranks[member.rank].held, place)
        for layer, slot, source, source_slot in self.configure.fetches.tolist():
            wanted = int(self.configure.placement[layer, slot])
            place, own = self.receiver(layer, slot)
            if source == CHECKPOINT:
                self._check_nobody_has(before, layer, wanted)
            elif not self._holds(before.get(source), layer, source_slot, wanted):
                receiver = ranks[members[place].rank]
                # A second slot of a rank may be a copy of one that was fetched just before.
                if source != receiver.rank or not self._holds(receiver.held, layer, source_slot, wanted):
                    text = f"expert {wanted} of layer {layer} is fetched from slot {source_slot} of rank {source}"
                    raise RuleBrokenError(f"{text}, which does not hold it: {before.get(source)}")
            ranks[members[place].rank].held[layer, own] = wanted
        for place, member in enumerate(members):
            held, needed = ranks[member.rank].held, self.wanted(place)
            if not np.array_equal(held, needed):
                raise RuleBrokenError(f"rank {member.rank} holds {held.tolist()} and should hold {needed.tolist()}")
        for process in ranks.values():
            process.spare = no_spare(process.held)

    def _check_nobody_has(self, before: dict[int, I32Matrix], layer: int, wanted: int) -> None:
        for rank, held in before.items():
            if wanted in held[layer].tolist():
                text = f"expert {wanted} of layer {layer} is read from the checkpoint"
                raise RuleBrokenError(f"{text}, and rank {rank} holds {held.tolist()}")

    @staticmethod
    def _holds(held: I32Matrix | None, layer: int, slot: int, expert: int) -> bool:
        return held is not None and slot < held.shape[1] and int(held[layer, slot]) == expert

    def carry_out_in_part(self, rank: int, process: SimRank, chance: random.Random) -> None:
        """What a rank holds that was called away in the middle: some fetches done, one perhaps half-way."""
        places = [place for place, member in enumerate(self.configure.members) if member.rank == rank]
        if not places or chance.random() < 0.3:
            return
        held = self.fit(process.held, places[0])
        own = [
            (layer, slot, self.receiver(layer, slot)[1])
            for layer, slot, _, _ in self.configure.fetches.tolist()
            if self.receiver(layer, slot)[0] == places[0]
        ]
        done = chance.randint(0, len(own))
        for layer, slot, number in own[:done]:
            held[layer, number] = self.configure.placement[layer, slot]
        if done < len(own) and chance.random() < 0.5:
            layer, _, number = own[done]
            held[layer, number] = EMPTY_SLOT
        process.held = held
