"""A rank of a cut model reads its slices, all of them and nothing else."""

from __future__ import annotations

import ctypes
import math
import mmap
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex, TensorEntry
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.shards import rank_shards
from drumline.protocol.weights import ModelWeights, Piece, Weight
from drumline.workers.loading import LoadPlan, load_weights
from drumline.workers.models import Decoder
from tests.checkpoints import Checkpoints
from tests.unit.specs import DENSE
from tests.unit.workers.pieces import empty_model

TP2, TP4 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}
DP2, EP = {"data_parallel_size": 2}, {"enable_expert_parallel": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-wide", TP2),
    ("llama-wide", TP4),
    ("llama-wide", {"pipeline_parallel_size": 3}),
    ("llama-kv2", TP4),
    ("llama-kv2", TP4 | {"attention_data_parallel_size": 2}),
    ("qwen3-wide", TP2 | {"pipeline_parallel_size": 2}),
    ("qwen3-moe-wide", TP4),
    ("qwen3-moe-wide", TP2 | DP2),
    ("qwen3-moe-wide", TP2 | DP2 | EP),
    ("mixtral-wide", DP2 | EP | {"pipeline_parallel_size": 2}),
    ("deepseek-v2-wide", TP2 | EP),
    ("deepseek-v3-wide", TP4),
    ("deepseek-v3-wide", TP2 | DP2 | {"attention_data_parallel_size": 2}),
]


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def pieces_of(model: Decoder) -> dict[str, set[Piece]]:
    return {name: {piece for _, piece in targets} for name, targets in model.plan.targets.items()}


def slice_of(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor[tuple(slice(*span) for span in piece.spans)]


def expected_copies(name: str, spec: ModelSpec, layout: Layout) -> int:
    """How many ranks of the world hold each entry of tensor ``name``."""
    dp, tp = layout.data_parallel_size, layout.tensor_parallel_size
    attn_dp = layout.attention_data_parallel_size
    if ".experts." in name:
        return 1
    if any(part in name for part in ("norm", ".gate.", "kv_a_proj", "q_a_proj", "o_proj.bias")):
        return dp * tp
    if "mlp." in name:
        return dp
    if ("k_proj" in name or "v_proj" in name) and spec.mla is None:
        return dp * tp // min(tp // attn_dp, spec.num_kv_heads)
    tied = "embed_tokens" in name and spec.tie_word_embeddings and layout.pipeline_parallel_size > 1
    return dp * attn_dp * (2 if tied else 1)


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_all_ranks_together_hold_each_entry_as_often_as_the_layout_says(
    name: str, sizes: dict[str, Any], checkpoints: Checkpoints
) -> None:
    folder, layout = checkpoints(name), Layout(**sizes)
    spec, index, tensors = ModelSpec.from_folder(folder), CheckpointIndex.open(folder), all_tensors(folder)
    held = {key: torch.zeros(tensor.shape, dtype=torch.int64) for key, tensor in tensors.items()}
    for rank in range(layout.num_ranks):
        model = empty_model(folder, layout, rank)
        for targets in model.plan.targets.values():
            for target, _ in targets:
                target.fill_(float("nan"))
        read = load_weights(model.plan, index)
        pieces = pieces_of(model)
        assert read == sum(piece.nbytes("float32") for parts in pieces.values() for piece in parts)
        assert read < index.total_bytes
        for key, targets in model.plan.targets.items():
            for target, piece in targets:
                # A norm of heads fills a row per head.
                assert torch.equal(target, slice_of(tensors[key], piece).expand_as(target)), f"rank {rank}: {key}"
        for key, parts in pieces.items():
            for piece in parts:
                slice_of(held[key], piece).add_(1)
    for key, counts in held.items():
        copies = expected_copies(key, spec, layout)
        assert bool((counts == copies).all()), f"{key}: {set(counts.view(-1).tolist())} copies, not {copies}"


def test_a_vocabulary_that_four_ranks_cannot_share_evenly(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama-wide")
    embedding = all_tensors(folder)["model.embed_tokens.weight"]
    start = 0
    for rank, rows in enumerate((63, 63, 62, 62)):
        model = empty_model(folder, Layout(tensor_parallel_size=4), rank)
        load_weights(model.plan, CheckpointIndex.open(folder))
        assert model.embedding is not None
        assert torch.equal(model.embedding.weight, embedding[start : start + rows])
        start += rows


def moved_away(index: CheckpointIndex, folder: Path, held: set[str]) -> CheckpointIndex:
    """The same index, whose tensors other than ``held`` lie in a file that is not there."""
    entries = {
        name: index[name] if name in held else msgspec.structs.replace(index[name], path=str(folder / "absent"))
        for name in index
    }
    return CheckpointIndex(folder, entries)


def test_experts_and_layers_of_other_ranks_are_not_touched(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3-moe-wide")
    index = CheckpointIndex.open(folder)
    layout = Layout(data_parallel_size=2, pipeline_parallel_size=2, enable_expert_parallel=True)
    for rank in range(layout.num_ranks):
        held = set(empty_model(folder, layout, rank).plan.targets)
        assert len(held) < 0.4 * len(index)
        read = load_weights(empty_model(folder, layout, rank).plan, moved_away(index, folder, held))
        assert read == sum(index[name].nbytes for name in held)
    some = next(name for name in held if ".experts." in name)
    with pytest.raises(InvalidConfig, match="absent"):
        load_weights(empty_model(folder, layout, rank).plan, moved_away(index, folder, held - {some}))


def _read_by_this_thread() -> int:
    with Path("/proc/thread-self/io").open() as file:
        return int(file.readline().split()[1])


def test_rows_of_other_ranks_are_not_read(checkpoints: Checkpoints) -> None:
    folder, layout = checkpoints("llama-wide"), Layout(tensor_parallel_size=4)
    index, model = CheckpointIndex.open(folder), empty_model(folder, layout, 2)
    # Slices of columns are mapped, which this counter does not see; the next test does.
    plan = LoadPlan(model.plan.weights)
    plan.targets = {name: to for name, to in model.plan.targets.items() if "o_proj" not in name and "down" not in name}
    before = _read_by_this_thread()
    told = load_weights(plan, index)
    assert told <= _read_by_this_thread() - before < told + 1000
    assert told < 0.3 * index.total_bytes


def _pages_read(path: Path) -> int:
    """How many pages of the file the system has in memory."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        seen = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, dtype=np.uint8)
        done = ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), seen)
        del view
    assert done == 0
    return sum(flags & 1 for flags in seen)


def test_columns_of_other_ranks_are_not_read(tmp_path: Path) -> None:
    # Nothing but a length on the disk: a page is in memory once it has been read, and no other way.
    rows, columns, share = 64, 1 << 17, 1 << 10
    path = tmp_path / "columns"
    with path.open("wb") as file:
        file.truncate(rows * columns * 4)
    assert _pages_read(path) == 0
    piece = Piece(Weight("w", "mlp", (rows, columns), (None, None)), ((0, rows), (share, 2 * share)))
    target = torch.full((rows, share), float("nan"))
    plan = LoadPlan(ModelWeights(DENSE))
    plan.targets["w"] = [(target, piece)]
    plan.weights.by_name["w"] = piece.weight
    entry = TensorEntry("w", str(path), "F32", (rows, columns), 0, rows * columns * 4)
    assert load_weights(plan, CheckpointIndex(tmp_path, {"w": entry})) == target.nbytes
    assert not bool(target.any())
    assert _pages_read(path) <= 2 * target.nbytes // mmap.PAGESIZE


@pytest.mark.parametrize("cut", ["o_proj", "down_proj"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_cut_short_within_a_slice_of_columns_is_named(
    cut: str, rank: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints("qwen3-wide"), folder)
    index, spec = CheckpointIndex.open(folder), ModelSpec.from_folder(folder)
    name = f"model.layers.3.{'self_attn' if cut == 'o_proj' else 'mlp'}.{cut}.weight"
    weights = ModelWeights(spec)
    piece = weights.piece(name, rank_shards(Layout(tensor_parallel_size=2), spec, rank))
    plan = LoadPlan(weights)
    plan.add(name, torch.empty(piece.shape), piece)
    entry = index[name]
    load_weights(plan, index)
    # One byte less than the last row: the file ends within a page, so that no fault of memory can tell.
    with Path(entry.path).open("r+b") as file:
        file.truncate(entry.start + entry.nbytes - 1)
    with pytest.raises(InvalidConfig, match=rf"{cut}\.weight ends after {entry.nbytes - 1} bytes"):
        load_weights(plan, index)
    with Path(entry.path).open("r+b") as file:
        file.truncate(entry.start - 5)
    with pytest.raises(InvalidConfig, match=rf"{cut}\.weight ends after 0 bytes"):
        load_weights(plan, index)


def with_tensors(folder: Path, target: Path, *names: str) -> Path:
    """A copy of a checkpoint as one file, with tensors of these names beside its own."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    save_file(all_tensors(folder) | {name: torch.ones(3) for name in names}, target / "model.safetensors")
    return target


EXTRA = (
    "model.layers.7.eh_proj.weight",
    "model.layers.7.embed_tokens.weight",
    "model.layers.7.mlp.experts.0.up_proj.weight",
    "model.layers.7.self_attn.q_a_proj.weight",
    "model.layers.7.shared_head.head.weight",
)


def test_layers_that_predict_further_tokens_are_left_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = with_tensors(checkpoints("deepseek-v3-wide"), tmp_path / "copy", *EXTRA)
    model = empty_model(folder, Layout(tensor_parallel_size=2), 1)
    assert not set(EXTRA) & set(model.plan.targets)
    index = CheckpointIndex.open(folder)
    pieces = [piece for parts in pieces_of(model).values() for piece in parts]
    assert load_weights(model.plan, index) == sum(4 * math.prod(piece.shape) for piece in pieces)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama-wide", "model.layers.7.self_attn.q_proj.weight"),
        ("llama-wide", "model.layers.0.self_attn.q_proj.bias"),
        ("deepseek-v3-wide", "model.layers.6.mlp.experts.16.up_proj.weight"),
        ("deepseek-v3-wide", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("deepseek-v3-wide", "model.layers.6.eh_proj.weight"),
        ("mixtral-wide", "model.layers.0.block_sparse_moe.experts.8.w1.weight"),
        ("mixtral-wide", "model.layers.0.mlp.experts.0.up_proj.weight"),
    ],
)
def test_other_tensors_are_refused_whatever_rank_would_hold_them(
    model: str, name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = with_tensors(checkpoints(model), tmp_path / "copy", name)
    index = CheckpointIndex.open(folder)
    for rank in range(2):
        with pytest.raises(InvalidConfig, match=name.replace(".", r"\.")):
            load_weights(empty_model(folder, Layout(tensor_parallel_size=2), rank).plan, index)
