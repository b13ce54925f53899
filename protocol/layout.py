"""The world as numbers: which rank stands where, and which ranks belong together.

``global_rank = (dp_rank * pp_size + pp_rank) * tp_size + tp_rank``. The ranks of one ``dp_rank`` are an engine replica.
Experts belong to the ``dp * tp`` ranks of their layer's own pipeline stage, never to other stages.

With attention data parallel the tp ranks of an engine replica form ``attn_dp`` attention replicas of
``attn_tp = tp / attn_dp`` neighbours each: ``tp_rank = attn_rank * attn_tp + attn_tp_rank``. Each has rows and a KV
cache of its own; without it an engine replica is one attention replica. Attention replicas are numbered
``dp_rank * attn_dp + attn_rank``.
"""

from __future__ import annotations

import msgspec

from drumline.protocol.errors import InvalidConfig

PLACEMENT_STRATEGIES = ("linear", "round_robin")


class Coordinates(msgspec.Struct, frozen=True, gc=False):
    """Where a rank stands. ``attn_rank``: which attention replica of its engine replica; ``attn_tp_rank``: its place
    there."""

    dp_rank: int
    pp_rank: int
    tp_rank: int
    attn_rank: int = 0
    attn_tp_rank: int = 0


class Layout(msgspec.Struct, frozen=True, gc=False):
    """The sizes of a world and all that follows from them by arithmetic.

    ``pipeline_partition``: layers of each stage, empty for an even split. :meth:`check` says whether the sizes can be;
    :func:`drumline.protocol.shards.check_model` whether a model can be cut so.
    """

    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    attention_data_parallel_size: int = 1
    pipeline_partition: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks of one engine replica: tp * pp."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole world: tp * pp * dp."""
        return self.world_size * self.data_parallel_size

    @property
    def attn_tp_size(self) -> int:
        """Over how many ranks the heads of one attention replica are sharded: tp / attn_dp."""
        return self.tensor_parallel_size // self.attention_data_parallel_size

    @property
    def num_replicas(self) -> int:
        """Attention replicas of the whole world: dp * attn_dp."""
        return self.data_parallel_size * self.attention_data_parallel_size

    @property
    def expert_group_size(self) -> int:
        """Ranks that hold the experts of a layer between them, whole or sharded: dp * tp."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def ep_size(self) -> int:
        """Over how many ranks whole experts are spread: dp * tp with expert parallel on, else 1."""
        return self.expert_group_size if self.enable_expert_parallel else 1

    # --------------------------------------------------------------------------------------------------------- places

    def global_rank(self, dp_rank: int, pp_rank: int = 0, tp_rank: int = 0) -> int:
        """``(dp_rank * pp_size + pp_rank) * tp_size + tp_rank``."""
        return (dp_rank * self.pipeline_parallel_size + pp_rank) * self.tensor_parallel_size + tp_rank

    def coordinates(self, rank: int) -> Coordinates:
        """Where global ``rank`` stands. Raises InvalidConfig for a rank outside the world."""
        if not 0 <= rank < self.num_ranks:
            raise InvalidConfig("rank", rank, f"0 to {self.num_ranks - 1}")
        rest, tp_rank = divmod(rank, self.tensor_parallel_size)
        dp_rank, pp_rank = divmod(rest, self.pipeline_parallel_size)
        attn_rank, attn_tp_rank = divmod(tp_rank, self.attn_tp_size)
        return Coordinates(dp_rank, pp_rank, tp_rank, attn_rank, attn_tp_rank)

    def ep_rank(self, rank: int) -> int:
        """The place of ``rank`` among those that hold whole experts: dp_rank * tp + tp_rank (0 with EP off)."""
        return self.expert_group_rank(rank) if self.enable_expert_parallel else 0

    def expert_group_rank(self, rank: int) -> int:
        """The place of ``rank`` in :meth:`expert_group`, EP on or off: dp_rank * tp + tp_rank."""
        at = self.coordinates(rank)
        return at.dp_rank * self.tensor_parallel_size + at.tp_rank

    def is_first_stage(self, rank: int) -> bool:
        """Whether the rank embeds the tokens."""
        return self.coordinates(rank).pp_rank == 0

    def is_last_stage(self, rank: int) -> bool:
        """Whether the rank computes logits."""
        return self.coordinates(rank).pp_rank == self.pipeline_parallel_size - 1

    # --------------------------------------------------------------------------------------------------------- groups

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

    def attn_tp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of ``rank``'s stage that shard the heads of its attention replica; the tp group without attention
        data parallel."""
        at = self.coordinates(rank)
        first = at.attn_rank * self.attn_tp_size
        return tuple(self.global_rank(at.dp_rank, at.pp_rank, first + t) for t in range(self.attn_tp_size))

    def attn_dp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same heads for the other attention replicas of ``rank``'s engine replica."""
        at = self.coordinates(rank)
        return tuple(
            self.global_rank(at.dp_rank, at.pp_rank, a * self.attn_tp_size + at.attn_tp_rank)
            for a in range(self.attention_data_parallel_size)
        )

    # ------------------------------------------------------------------------------------------------------- replicas

    def replica_ranks(self, dp_rank: int) -> tuple[int, ...]:
        """The ranks of one engine replica, ascending."""
        first = self.global_rank(dp_rank)
        return tuple(range(first, first + self.world_size))

    def replica_of(self, rank: int) -> int:
        """The attention replica whose rows ``rank`` computes: dp_rank * attn_dp + attn_rank."""
        at = self.coordinates(rank)
        return at.dp_rank * self.attention_data_parallel_size + at.attn_rank

    def ranks_of_replica(self, replica: int) -> tuple[int, ...]:
        """The ranks of one attention replica over all stages, ascending. Raises InvalidConfig for one that is not."""
        if not 0 <= replica < self.num_replicas:
            raise InvalidConfig("replica", replica, f"0 to {self.num_replicas - 1}")
        dp_rank, attn_rank = divmod(replica, self.attention_data_parallel_size)
        first = attn_rank * self.attn_tp_size
        return tuple(
            self.global_rank(dp_rank, p, first + t)
            for p in range(self.pipeline_parallel_size)
            for t in range(self.attn_tp_size)
        )

    def reporting_rank(self, replica: int) -> int:
        """The rank that returns the tokens of an attention replica: the first of its last stage."""
        return self.ranks_of_replica(replica)[-self.attn_tp_size]

    def lockstep_groups(self, is_moe: bool) -> tuple[tuple[int, ...], ...]:
        """The dp ranks of each lockstep group: all together for a MoE model, each alone for a dense one."""
        replicas = range(self.data_parallel_size)
        return (tuple(replicas),) if is_moe else tuple((replica,) for replica in replicas)

    def check(self) -> None:
        """Refuse sizes that make no world, naming the field. Raises InvalidConfig."""
        for field in ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"):
            size = getattr(self, field)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InvalidConfig(field, size, "a whole number from 1")
        attn_dp = self.attention_data_parallel_size
        if attn_dp < 1 or self.tensor_parallel_size % attn_dp:
            valid = f"a divisor of tensor_parallel_size ({self.tensor_parallel_size})"
            raise InvalidConfig("attention_data_parallel_size", attn_dp, valid)
        stages = len(self.pipeline_partition)
        if stages and (stages != self.pipeline_parallel_size or min(self.pipeline_partition) < 1):
            valid = f"{self.pipeline_parallel_size} numbers of layers, each 1 or more"
            raise InvalidConfig("pipeline_partition", list(self.pipeline_partition), valid)


def slots_per_rank(num_physical: int, ep_size: int) -> tuple[int, ...]:
    """How many physical expert slots each ep rank has: even, the first ``num_physical % ep_size`` one more."""
    if ep_size < 1 or num_physical < 0:
        raise InvalidConfig("ep_size", f"{num_physical} slots over {ep_size} ranks", "0 or more slots over 1 or more")
    share, more = divmod(num_physical, ep_size)
    return tuple(share + 1 if rank < more else share for rank in range(ep_size))
