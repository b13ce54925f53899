"""The world as numbers: which rank stands where, and which ranks belong together.

``global_rank = (dp_rank * pp_size + pp_rank) * tp_size + tp_rank``. The ranks of one ``dp_rank`` are an engine replica.
Expert parallel splits the experts of a layer over the ``dp * tp`` ranks of that layer's own pipeline stage, never
across stages.
"""

from __future__ import annotations

import msgspec

from drumline.protocol.errors import InvalidConfig

PLACEMENT_STRATEGIES = ("linear", "round_robin")


class Coordinates(msgspec.Struct, frozen=True, gc=False):
    """Where a rank stands."""

    dp_rank: int
    pp_rank: int
    tp_rank: int


class Layout(msgspec.Struct, frozen=True, gc=False):
    """The sizes of a world and all that follows from them by arithmetic. :meth:`validate` says whether it can run."""

    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of one engine replica: tp * pp."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole world: tp * pp * dp."""
        return self.world_size * self.data_parallel_size

    @property
    def ep_size(self) -> int:
        """Over how many ranks whole experts are spread: dp * tp with expert parallel on, else 1."""
        return self.data_parallel_size * self.tensor_parallel_size if self.enable_expert_parallel else 1

    def global_rank(self, dp_rank: int, pp_rank: int = 0, tp_rank: int = 0) -> int:
        """``(dp_rank * pp_size + pp_rank) * tp_size + tp_rank``."""
        return (dp_rank * self.pipeline_parallel_size + pp_rank) * self.tensor_parallel_size + tp_rank

    def coordinates(self, rank: int) -> Coordinates:
        """Where global ``rank`` stands. Raises InvalidConfig for a rank outside the world."""
        if not 0 <= rank < self.num_ranks:
            raise InvalidConfig("rank", rank, f"0 to {self.num_ranks - 1}")
        rest, tp_rank = divmod(rank, self.tensor_parallel_size)
        dp_rank, pp_rank = divmod(rest, self.pipeline_parallel_size)
        return Coordinates(dp_rank, pp_rank, tp_rank)

    def ep_rank(self, rank: int) -> int:
        """The place of ``rank`` in its expert group, 0 to ep_size - 1: dp_rank * tp + tp_rank (0 with EP off)."""
        at = self.coordinates(rank)
        return at.dp_rank * self.tensor_parallel_size + at.tp_rank if self.enable_expert_parallel else 0

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share the layers of ``rank``'s stage in its replica, by tp_rank."""
        at = self.coordinates(rank)
        return tuple(self.global_rank(at.dp_rank, at.pp_rank, t) for t in range(self.tensor_parallel_size))

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the other stages for ``rank``, by stage."""
        at = self.coordinates(rank)
        return tuple(self.global_rank(at.dp_rank, p, at.tp_rank) for p in range(self.pipeline_parallel_size))

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that stand where ``rank`` stands in the other replicas, by dp_rank."""
        at = self.coordinates(rank)
        return tuple(self.global_rank(d, at.pp_rank, at.tp_rank) for d in range(self.data_parallel_size))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """The dp * tp ranks of ``rank``'s stage that hold its experts between them, by ep_rank (EP on or off)."""
        at = self.coordinates(rank)
        return tuple(
            self.global_rank(d, at.pp_rank, t)
            for d in range(self.data_parallel_size)
            for t in range(self.tensor_parallel_size)
        )

    def replica_ranks(self, dp_rank: int) -> tuple[int, ...]:
        """The ranks of one engine replica, ascending."""
        first = self.global_rank(dp_rank)
        return tuple(range(first, first + self.world_size))

    def lockstep_groups(self, is_moe: bool) -> tuple[tuple[int, ...], ...]:
        """The dp ranks of each lockstep group: all together for a MoE model, each alone for a dense one."""
        replicas = range(self.data_parallel_size)
        return (tuple(replicas),) if is_moe else tuple((replica,) for replica in replicas)

    def validate(self, num_experts: int) -> None:
        """Refuse what cannot run, naming the field. ``num_experts`` is 0 for a dense model. Raises InvalidConfig."""
        for field in ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"):
            size = getattr(self, field)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InvalidConfig(field, size, "a whole number from 1")
        for field in ("pipeline_parallel_size", "tensor_parallel_size"):
            if getattr(self, field) > 1:
                raise InvalidConfig(
                    field, getattr(self, field), "1 (this version splits models over data_parallel_size)"
                )
        if self.enable_expert_parallel and num_experts == 0:
            raise InvalidConfig("enable_expert_parallel", True, "False (the model has no experts)")
        if num_experts and self.data_parallel_size > 1 and not self.enable_expert_parallel:
            raise InvalidConfig(
                "enable_expert_parallel",
                False,
                f"True for a model with experts at data_parallel_size {self.data_parallel_size} "
                "(without it data_parallel_size must be 1)",
            )
        if self.ep_size > max(num_experts, 1):
            raise InvalidConfig(
                "data_parallel_size",
                self.data_parallel_size,
                f"1 to {num_experts // self.tensor_parallel_size} (each rank needs one of {num_experts} experts)",
            )


def slots_per_rank(num_physical: int, ep_size: int) -> tuple[int, ...]:
    """How many physical expert slots each ep rank has: even, the first ``num_physical % ep_size`` one more."""
    if ep_size < 1 or num_physical < 0:
        raise InvalidConfig("ep_size", f"{num_physical} slots over {ep_size} ranks", "0 or more slots over 1 or more")
    share, more = divmod(num_physical, ep_size)
    return tuple(share + 1 if rank < more else share for rank in range(ep_size))
