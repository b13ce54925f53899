"""Loading reads what the rank holds and nothing else, and says what is wrong with a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.workers.loading import load_weights, resolve_dtype
from tests.checkpoints import Checkpoints
from tests.unit.workers.pieces import empty_model


def rewritten(folder: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a one-file checkpoint with tensors replaced, added, or (None) left out."""
    shutil.copytree(folder, target)
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, target / "model.safetensors")
    return target


def experts_over(ranks: int) -> Layout:
    return Layout(data_parallel_size=ranks, enable_expert_parallel=ranks > 1)


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_a_rank_reads_only_the_experts_that_it_holds(checkpoints: Checkpoints, strategy: str) -> None:
    folder = checkpoints("qwen3-moe")
    index = CheckpointIndex.open(folder)
    experts = sum(index[name].nbytes for name in index if ".experts." in name)
    common = index.total_bytes - experts
    for ep_size in (1, 2, 4):
        for rank in range(ep_size):
            read = load_weights(empty_model(folder, experts_over(ep_size), rank, strategy=strategy).plan, index)
            assert read == common + experts // ep_size


def test_slots_hold_the_experts_of_the_placement(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3-moe-mixed-layers")
    model = empty_model(folder, experts_over(2), 1, strategy="round_robin")
    load_weights(model.plan, CheckpointIndex.open(folder))
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.2.mlp.experts"
    for slot, expert in enumerate((1, 3, 5)):
        gate, up = model.moe_layers[1].experts.gate_up[slot].chunk(2)
        assert torch.equal(gate, tensors[f"{prefix}.{expert}.gate_proj.weight"])
        assert torch.equal(up, tensors[f"{prefix}.{expert}.up_proj.weight"])
        assert torch.equal(model.moe_layers[1].experts.down[slot], tensors[f"{prefix}.{expert}.down_proj.weight"])


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


def in_dtype(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    tensors = load_file(folder / "model.safetensors")
    return rewritten(folder, target, **{name: tensor.to(dtype) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_auto_computes_in_what_the_checkpoint_is_in_and_in_float32_for_float16(
    checkpoints: Checkpoints, tmp_path: Path, stored: torch.dtype, computed: torch.dtype
) -> None:
    index = CheckpointIndex.open(in_dtype(checkpoints("qwen3"), tmp_path / "copy", stored))
    assert resolve_dtype("auto", index) == computed
    assert resolve_dtype("float32", index) == torch.float32
    assert resolve_dtype("bfloat16", index) == torch.bfloat16


def test_auto_goes_by_most_bytes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = in_dtype(checkpoints("qwen3"), tmp_path / "all", torch.bfloat16)
    mixed = rewritten(folder, tmp_path / "mixed", **{"model.norm.weight": torch.ones(64)})
    assert resolve_dtype("auto", CheckpointIndex.open(mixed)) == torch.bfloat16


@pytest.mark.parametrize("name", ["float16", "half", "int8", ""])
def test_another_dtype_is_refused_by_name(checkpoints: Checkpoints, name: str) -> None:
    with pytest.raises(InvalidConfig, match="valid: auto, float32, bfloat16") as caught:
        resolve_dtype(name, CheckpointIndex.open(checkpoints("llama")))
    assert (caught.value.field, caught.value.info.found) == ("dtype", name)


def test_a_tensor_of_a_dtype_that_weights_do_not_have_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    ints = torch.ones(64, dtype=torch.int32)
    folder = rewritten(checkpoints("qwen3"), tmp_path / "copy", **{"model.norm.weight": ints})
    with pytest.raises(InvalidConfig, match=r"model\.norm\.weight in I32; valid: tensors in F32, BF16, F16"):
        load_weights(empty_model(folder).plan, CheckpointIndex.open(folder))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_what_is_computed_in(
    checkpoints: Checkpoints, tmp_path: Path, stored: torch.dtype, computed: torch.dtype
) -> None:
    folder = in_dtype(checkpoints("qwen3"), tmp_path / "copy", stored)
    tensors = load_file(folder / "model.safetensors")
    model = empty_model(folder, Layout(tensor_parallel_size=2), 1, dtype=computed)
    load_weights(model.plan, CheckpointIndex.open(folder))
    assert model.embedding is not None
    assert torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"][128:].to(computed))
    # By columns.
    out = model.layers[1].attention.out.linear.weight
    assert torch.equal(out, tensors["model.layers.1.self_attn.o_proj.weight"][:, 32:].to(computed))
