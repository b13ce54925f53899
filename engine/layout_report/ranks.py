"""What each rank of a world holds, said by the functions that workers load by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from drumline.protocol.layout import Coordinates, Layout
from drumline.protocol.messages import NO_NUMBERS
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import I32, PlacementMaps
from drumline.protocol.shards import RankShards, Span, rank_shards
from drumline.protocol.weights import DTYPE_BYTES, ModelWeights, kv_entries_per_token

NOTHING: Span = (0, 0)


class RankReport(msgspec.Struct, frozen=True):
    """One rank. Ranges are half open, and (0, 0) where its stage has nothing of the kind.

    ``layers``: of its pipeline stage; ``moe_layers`` of them have experts. ``embedding``: it embeds the tokens;
    ``head``: it computes logits; ``vocab``: its rows of both. ``q_heads``, ``kv_heads``: of its attention replica; with
    latent attention the one KV head is the latent. ``kv_replicated``: other ranks of the replica hold the same KV
    heads. ``mlp``, ``shared_mlp``, ``expert_mlp``: channels of the dense network, the shared experts and every routed
    expert that it holds.
    ``experts``: by MoE layer, the logical experts it holds (whole or, with expert parallel off, a slice of each),
    ascending; ``redundant_experts``: those of which an earlier slot holds a copy. ``groups``: the ranks, itself
    included, that it computes with: tp, pp, dp, ep (those that hold the experts of its stage between them, with expert
    parallel on or off; dense models have none), attn_tp, attn_dp. ``weight_bytes`` by kind; ``staging_bytes``: of
    the buffers in which experts arrive that move while the rank computes. Three are None unless the memory of a GPU is
    known: ``kv_bytes_free`` what it leaves for KV (negative: weights do not fit), ``kv_tokens`` how many tokens that
    holds, ``fits`` whether one sequence of the longest context has room.
    """

    rank: int
    dp_rank: int
    pp_rank: int
    tp_rank: int
    ep_rank: int
    attn_rank: int
    attn_tp_rank: int
    replica: int
    layers: Span
    moe_layers: int
    embedding: bool
    head: bool
    vocab: Span
    q_heads: Span
    kv_heads: Span
    kv_replicated: bool
    mlp: Span
    shared_mlp: Span
    expert_mlp: Span
    experts: dict[int, tuple[int, ...]]
    redundant_experts: dict[int, tuple[int, ...]]
    groups: dict[str, tuple[int, ...]]
    weight_bytes: dict[str, int]
    total_weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_free: int | None = None
    kv_tokens: int | None = None
    fits: bool | None = None
    staging_bytes: int = 0

    @property
    def num_experts(self) -> int:
        """Experts of each MoE layer that the rank holds, the most of any layer."""
        return max((len(ids) for ids in self.experts.values()), default=0)


def rank_groups(layout: Layout, spec: ModelSpec, rank: int) -> dict[str, tuple[int, ...]]:
    """The groups of ``rank``, as :class:`RankReport` names them."""
    groups = {"tp": layout.tp_group(rank), "pp": layout.pp_group(rank), "dp": layout.dp_group(rank)}
    if spec.is_moe:
        groups["ep"] = layout.expert_group(rank)
    return {**groups, "attn_tp": layout.attn_tp_group(rank), "attn_dp": layout.attn_dp_group(rank)}


class _ExpertShares:
    """Which experts each ep rank holds; a placement's rows are often alike and are read once."""

    def __init__(self, layout: Layout, spec: ModelSpec, placement: I32 | None, own: I32) -> None:
        self._layers = {layer: row for row, layer in enumerate(spec.moe_layers)}
        self._known: dict[tuple[bytes, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._maps: PlacementMaps | None = None
        if spec.is_moe and placement is not None:
            self._maps = PlacementMaps.build(placement, spec.num_experts, layout.ep_size, own)
            self._rows = [row.tobytes() for row in self._maps.physical_to_logical]

    def of(self, shards: RankShards) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]], dict[int, int]]:
        """By MoE layer of the rank: experts held, those that are further copies, and how many slots they take."""
        experts, redundant, slots = {}, {}, {}
        for layer in range(*shards.layers):
            if layer in self._layers and self._maps is not None:
                experts[layer], redundant[layer] = self._share(self._maps, self._layers[layer], shards.ep_rank)
                slots[layer] = len(self._maps.local_slots(shards.ep_rank))
        return experts, redundant, slots

    def _share(self, maps: PlacementMaps, row: int, ep_rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        key = (self._rows[row], ep_rank)
        if key not in self._known:
            local = maps.local_slots(ep_rank)
            held = maps.physical_to_logical[row, local.start : local.stop].tolist()
            first = maps.logical_to_physical[row, :, 0]
            again = sorted(expert for slot, expert in zip(local, held, strict=True) if first[expert] != slot)
            self._known[key] = (tuple(sorted(set(held))), tuple(again))
        return self._known[key]


class _Sizes:
    """Bytes of a rank; ranks that hold as much of everything are weighed once."""

    def __init__(self, spec: ModelSpec, dtype: str, device: str) -> None:
        self._weights = ModelWeights(spec)
        self._dtype = dtype
        self._device = device
        self._known: dict[tuple[object, ...], dict[str, int]] = {}

    def of(self, shards: RankShards, slots: dict[int, int]) -> dict[str, int]:
        cut = (shards.vocab, shards.q_heads, shards.kv_heads, shards.mlp, shards.shared_mlp, shards.expert_mlp)
        widths = tuple(end - start for start, end in cut)
        key = (shards.layers, widths, tuple(slots.values()))
        if key not in self._known:
            self._known[key] = self._weights.bytes_by_kind(shards, slots, self._dtype, self._device)
        return dict(self._known[key])


def rank_reports(
    layout: Layout,
    spec: ModelSpec,
    placements: Mapping[int, I32] | I32 | None,
    dtype: str,
    kv_dtype: str,
    ranks: Iterable[int] | None = None,
    device: str = "cuda",
    slots: I32 = NO_NUMBERS,
    staged: bool = False,
) -> tuple[RankReport, ...]:
    """One report per rank, or for ``ranks`` alone; ``check_model`` must have passed.

    ``placements``: int32 (moe_layers, slots), the logical expert of each slot, or one such by lockstep group; None for
    a dense model. ``dtype`` and ``kv_dtype``: float32, bfloat16 or float16, of weights and KV cache. ``device``: cuda
    or cpu, which holds a large tied output head twice. ``slots``: int32 (ep ranks,), how many expert slots each has;
    empty: shared out evenly. ``staged``: with a staging buffer for each slot of a layer.
    """
    if isinstance(placements, Mapping):
        placements = placements.get(0)  # all replicas of a MoE model are one lockstep group
    shares, sizes = _ExpertShares(layout, spec, placements, slots), _Sizes(spec, dtype, device)
    reports = []
    for rank in range(layout.num_ranks) if ranks is None else ranks:
        shards = rank_shards(layout, spec, rank)
        experts, redundant, held = shares.of(shards)
        weight_bytes = sizes.of(shards, held)
        one = _report(layout, spec, rank, shards, experts, redundant, weight_bytes, DTYPE_BYTES[kv_dtype])
        if staged and held:
            # A rank has as many slots in every layer, and buffers for those of one.
            one = msgspec.structs.replace(one, staging_bytes=weight_bytes.get("experts", 0) // len(held))
        reports.append(one)
    return tuple(reports)


def _report(
    layout: Layout,
    spec: ModelSpec,
    rank: int,
    shards: RankShards,
    experts: dict[int, tuple[int, ...]],
    redundant: dict[int, tuple[int, ...]],
    weight_bytes: dict[str, int],
    kv_entry_bytes: int,
) -> RankReport:
    at: Coordinates = layout.coordinates(rank)
    return RankReport(
        rank=rank,
        dp_rank=at.dp_rank,
        pp_rank=at.pp_rank,
        tp_rank=at.tp_rank,
        ep_rank=shards.ep_rank,
        attn_rank=at.attn_rank,
        attn_tp_rank=at.attn_tp_rank,
        replica=layout.replica_of(rank),
        layers=shards.layers,
        moe_layers=len(experts),
        embedding=shards.first_stage,
        head=shards.last_stage,
        vocab=shards.vocab if shards.first_stage or shards.last_stage else NOTHING,
        q_heads=shards.q_heads,
        kv_heads=shards.kv_heads,
        kv_replicated=shards.kv_replicated,
        mlp=shards.mlp if "mlp" in weight_bytes else NOTHING,
        shared_mlp=shards.shared_mlp if experts else NOTHING,
        expert_mlp=shards.expert_mlp if experts else NOTHING,
        experts=experts,
        redundant_experts=redundant,
        groups=rank_groups(layout, spec, rank),
        weight_bytes=weight_bytes,
        total_weight_bytes=sum(weight_bytes.values()),
        kv_bytes_per_token=kv_entries_per_token(spec, shards) * kv_entry_bytes,
    )
