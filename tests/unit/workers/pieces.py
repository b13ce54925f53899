"""Models of single ranks before they are loaded, and what of the checkpoint each plans to read."""

from __future__ import annotations

from pathlib import Path

import torch

from drumline.protocol.layout import Layout
from drumline.protocol.messages import I32Matrix
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps, initial_placement
from drumline.workers.models import Decoder, ModelBuild

CPU = torch.device("cpu")


def placement_maps(spec: ModelSpec, layout: Layout, strategy: str = "linear") -> PlacementMaps:
    """The placement that a worker starts with."""
    ep_size = layout.ep_size if spec.is_moe else 1
    placement = initial_placement(len(spec.moe_layers), spec.num_experts, ep_size, strategy)
    return PlacementMaps.build(placement, spec.num_experts, ep_size)


def own_slots(spec: ModelSpec, layout: Layout, rank: int = 0, strategy: str = "linear") -> I32Matrix:
    """The experts of the slots of ``rank``: (MoE layers, slots)."""
    maps = placement_maps(spec, layout, strategy)
    own = maps.local_slots(layout.ep_rank(rank))
    return maps.physical_to_logical[:, own.start : own.stop]


def empty_model(
    folder: Path,
    layout: Layout | None = None,
    rank: int = 0,
    *,
    strategy: str = "linear",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """What ``rank`` allocates; its memory is undefined until the plan has been carried out."""
    spec, layout = ModelSpec.from_folder(folder), layout or Layout()
    return Decoder(ModelBuild(spec, layout, rank, own_slots(spec, layout, rank, strategy), 64, dtype, CPU))
