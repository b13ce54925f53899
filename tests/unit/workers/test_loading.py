"""Loading reads what the rank holds and nothing else, and says what is wrong with a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps, initial_placement
from drumline.workers.loading import load_weights, resolve_dtype
from drumline.workers.models import Decoder, ModelPlacement, build_model
from tests.checkpoints import Checkpoints

CPU = torch.device("cpu")


def empty_model(folder: Path, ep_rank: int = 0, ep_size: int = 1, strategy: str = "linear") -> Decoder:
    spec = ModelSpec.from_folder(folder)
    placement = initial_placement(len(spec.moe_layers), spec.num_experts, ep_size, strategy)
    maps = PlacementMaps.build(placement, spec.num_experts, ep_size)
    return build_model(spec, ModelPlacement(maps, ep_rank, 64, torch.float32, CPU))


def rewritten(folder: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a one-file checkpoint with tensors replaced, added, or (None) left out."""
    shutil.copytree(folder, target)
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_a_rank_reads_only_the_experts_that_it_holds(checkpoints: Checkpoints, strategy: str) -> None:
    folder = checkpoints("qwen3-moe")
    index = CheckpointIndex.open(folder)
    experts = sum(index[name].nbytes for name in index if ".experts." in name)
    common = index.total_bytes - experts
    for ep_size in (1, 2, 4):
        for rank in range(ep_size):
            read = load_weights(empty_model(folder, rank, ep_size, strategy).plan, index)
            assert read == common + experts // ep_size


def test_slots_hold_the_experts_of_the_placement(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3-moe-mixed-layers")
    model = empty_model(folder, ep_rank=1, ep_size=2, strategy="round_robin")
    load_weights(model.plan, CheckpointIndex.open(folder))
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.2.mlp.experts"
    for slot, expert in enumerate((1, 3, 5)):
        gate, up = model.moe_layers[1].gate_up[slot].chunk(2)
        assert torch.equal(gate, tensors[f"{prefix}.{expert}.gate_proj.weight"])
        assert torch.equal(up, tensors[f"{prefix}.{expert}.up_proj.weight"])
        assert torch.equal(model.moe_layers[1].down[slot], tensors[f"{prefix}.{expert}.down_proj.weight"])


def test_progress_rises_to_the_total(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama")
    index = CheckpointIndex.open(folder)
    told: list[tuple[int, int]] = []
    read = load_weights(empty_model(folder).plan, index, lambda done, total: told.append((done, total)))
    assert [total for _, total in told] == [read] * len(told)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == read == index.total_bytes


def test_a_file_cut_short_after_the_index_was_read_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints("qwen3"), folder)
    index = CheckpointIndex.open(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    with pytest.raises(InvalidConfig, match=r"model\.safetensors: .* ends after \d+ bytes"):
        load_weights(empty_model(folder).plan, index)


def test_a_missing_tensor_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = rewritten(checkpoints("qwen3"), tmp_path / "copy", **{"model.norm.weight": None})
    with pytest.raises(InvalidConfig, match=r"no tensor model\.norm\.weight"):
        load_weights(empty_model(folder).plan, CheckpointIndex.open(folder))


def test_a_tensor_that_the_model_does_not_know_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = rewritten(checkpoints("qwen3"), tmp_path / "copy", **{name: torch.zeros(64)})
    with pytest.raises(InvalidConfig, match=name):
        load_weights(empty_model(folder).plan, CheckpointIndex.open(folder))


def test_a_head_beside_tied_embeddings_and_old_rotary_buffers_are_ignored(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    extra = {
        "lm_head.weight": torch.zeros(256, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    folder = rewritten(checkpoints("llama-tied"), tmp_path / "copy", **extra)
    load_weights(empty_model(folder).plan, CheckpointIndex.open(folder))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = rewritten(checkpoints("qwen3"), tmp_path / "copy", **{"model.norm.weight": torch.ones(32)})
    with pytest.raises(InvalidConfig, match=r"model\.norm\.weight of shape \[32\].*\[64\]"):
        load_weights(empty_model(folder).plan, CheckpointIndex.open(folder))


def test_other_dtypes_are_refused_by_name_and_converted_on_request(checkpoints: Checkpoints, tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in load_file(checkpoints("qwen3") / "model.safetensors").items()}
    folder = rewritten(checkpoints("qwen3"), tmp_path / "copy", **halves)
    index = CheckpointIndex.open(folder)
    with pytest.raises(InvalidConfig, match="bfloat16"):
        resolve_dtype("auto", index)
    with pytest.raises(InvalidConfig, match="found bfloat16; valid: auto or float32"):
        resolve_dtype("bfloat16", index)
    assert resolve_dtype("float32", index) == torch.float32
    model = empty_model(folder)
    load_weights(model.plan, index)
    assert torch.equal(model.embedding.weight, halves["model.embed_tokens.weight"].float())


def test_auto_takes_a_float32_checkpoint(checkpoints: Checkpoints) -> None:
    assert resolve_dtype("auto", CheckpointIndex.open(checkpoints("llama"))) == torch.float32
