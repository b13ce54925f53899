"""The groups of a rank in one epoch: which there are, and what the model does in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from drumline.workers.collectives import Group, LoneGroup
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.all_to_all import AllToAllExchange
from drumline.workers.experts.exchange import GatherExchange
from drumline.workers.experts.shared import SharedExchange
from drumline.workers.groups import GroupCoordinator
from drumline.workers.layers.moe import ExpertExchange, LocalExchange
from drumline.workers.pipeline import Pipeline


@dataclass(slots=True)
class StepGroups:
    """What a model's steps meet in. ``pipeline`` is None without other stages."""

    tp: Group = field(default_factory=LoneGroup)
    attn_tp: Group = field(default_factory=LoneGroup)
    experts: Group = field(default_factory=LoneGroup)
    exchange: ExpertExchange = field(default_factory=LocalExchange)
    pipeline: Pipeline | None = None


FormGroup = Callable[[str, tuple[int, ...], bool], GroupCoordinator]
"""Forms a group: its name, its global ranks, and whether its sockets are connected at once."""


class EpochGroups:
    """Every group that a rank belongs to in an epoch, one coordinator each; those of one rank alone are trivial.

    ``dp`` has the same place in other engine replicas: it exists where they step together, for whoever needs it (user
    methods, moves of weights); the steps themselves use ``experts``. ``attn_dp``: the same heads for other attention
    replicas. ``pp`` carries hidden states, ``pp_tokens`` sampled tokens.
    """

    def __init__(self, place: EpochPlace, me: int, *, lockstep: bool, all2all_backend: str, form: FormGroup) -> None:
        """Forms them one after the other, in the same order on all ranks. ``me``: this rank in the whole world; a
        parked one is in no group with others. Raises what ``form`` raises; what had been formed is closed then."""
        layout, rank = place.layout, place.rank
        alone = (me,)

        def ranks(group: Callable[[int], tuple[int, ...]], together: bool = True) -> tuple[int, ...]:
            return alone if place.parked or not together else place.world_ranks(group(rank))

        self._all: list[GroupCoordinator] = []
        try:
            self.tp = self._form(form, "tp", ranks(layout.tp_group))
            self.attn_tp = self.tp
            self.attn_dp = self._form(form, "attn_dp", ranks(layout.attn_dp_group))
            if layout.attention_data_parallel_size > 1:
                self.attn_tp = self._form(form, "attn_tp", ranks(layout.attn_tp_group))
            self.pp = self._form(form, "pp", ranks(layout.pp_group), connect=True)
            self.pp_tokens = self._form(form, "pp_tokens", ranks(layout.pp_group), connect=True)
            self.dp = self._form(form, "dp", ranks(layout.dp_group, lockstep))
            self.ep = self._form(form, "ep", ranks(layout.expert_group, lockstep))
        except BaseException:
            self.close()
            raise
        self._exchange: ExpertExchange = LocalExchange()
        if lockstep and layout.ep_size > 1 and not place.parked:
            self._exchange = _exchange(self.ep, all2all_backend)

    def _form(self, form: FormGroup, name: str, ranks: tuple[int, ...], connect: bool = False) -> GroupCoordinator:
        # Groups of one kind meet at one store: the first rank tells them apart.
        group = form(f"{name}.{ranks[0]}", ranks, connect)
        self._all.append(group)
        return group

    def __iter__(self) -> Iterator[GroupCoordinator]:
        return iter(self._all)

    def for_steps(self) -> StepGroups:
        """The groups as the model uses them."""
        pipeline = Pipeline(self.pp, self.pp_tokens) if self.pp.world_size > 1 else None
        return StepGroups(self.tp, self.attn_tp, self.ep, self._exchange, pipeline)

    def close(self) -> None:
        """Give all of them up. Never blocks."""
        for group in self._all:
            group.close()


def _exchange(group: GroupCoordinator, backend: str) -> ExpertExchange:
    if backend == "all_to_all":
        return AllToAllExchange(group, torch.device(group.device))
    return GatherExchange(group) if group.mailboxes is None else SharedExchange(group, group.mailboxes)
