"""``drumline layout``, as a shell sees it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from click.testing import CliRunner, Result

from drumline.engine.cli import main
from drumline.engine.known_models import known_models
from drumline.engine.layout_report.report import SCHEMA_PATH, LayoutReport
from drumline.engine.resolve import model_folder

V3 = ("--model", "deepseek-v3", "-tp", "2", "-pp", "4", "--enable-expert-parallel")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["layout", *arguments])


def answer(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA_PATH.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    "arguments",
    [
        V3,
        (*V3, "--gpu-memory", "80GiB", "--explain"),
        ("--model", "llama-3-70b", "-tp", "4", "--num-gpus", "8", "--gpu-memory", "24GB"),
        ("--model", "mixtral-8x7b", "-dp", "2", "-tp", "4", "--num-gpus", "12"),
        ("--model", "qwen3-30b-a3b", "-tp", "16", "--enable-dp-attention", "--enable-expert-parallel"),
        ("--model", "demo", "-dp", "2", "--enable-expert-parallel", "--expert-placement-strategy", "round_robin"),
    ],
)
def test_json_is_what_the_schema_says(validator: jsonschema.Draft202012Validator, arguments: tuple[str, ...]) -> None:
    validator.validate(answer(*arguments))


@pytest.mark.parametrize("name", known_models())
def test_every_known_model_has_a_layout(validator: jsonschema.Draft202012Validator, name: str) -> None:
    validator.validate(answer("--model", name, "-tp", "2", "--gpu-memory", "80GiB"))


def test_the_schema_refuses_what_it_should(validator: jsonschema.Draft202012Validator) -> None:
    good = answer("--model", "demo")
    changes: list[dict[str, Any]] = [{"idle_gpus": -1}, {"ranks": []}, {"surplus": 1}, {"groups": {"tp": [[0]]}}]
    for change in changes:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**good, **change})
    del good["ranks"][0]["layers"]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(good)


def test_json_reads_back_as_the_report() -> None:
    done = run(*V3, "--json")
    made = msgspec.json.decode(done.stdout, type=LayoutReport)
    assert json.loads(made.to_json()) == json.loads(done.stdout)
    # One rank per line, for eyes and for grep.
    assert sum(line.startswith('    {"rank"') for line in done.stdout.splitlines()) == 8


def test_deepseek_v3_has_128_experts_on_each_rank_of_a_stage() -> None:
    for one in answer(*V3)["ranks"]:
        assert {len(ids) for ids in one["experts"].values()} == {128}


def test_idle_gpus_and_what_to_add() -> None:
    made = answer("--model", "deepseek-v3", "-tp", "4", "--num-gpus", "8")
    assert made["idle_gpus"] == 4
    assert "add -dp 2" in made["suggestion"]


def test_sixty_four_ranks_take_less_than_three_seconds() -> None:
    began = time.monotonic()
    made = answer("--model", "deepseek-v3", "-tp", "8", "-dp", "8", "--enable-expert-parallel")
    assert len(made["ranks"]) == 64
    assert time.monotonic() - began < 3.0


def test_the_table_fits_a_hundred_columns() -> None:
    for arguments in (V3, ("--model", "qwen3-235b-a22b", "-tp", "8", "-dp", "8", "--enable-expert-parallel")):
        done = run(*arguments, "--gpu-memory", "192GiB")
        assert done.exit_code == 0
        assert max(map(len, done.stdout.splitlines())) <= 100
        assert "weights by kind" in done.stdout


def test_the_table_names_each_of_a_few_ranks_and_folds_many() -> None:
    few = run(*V3).stdout
    assert all(f"\n{rank} " in few for rank in range(8))
    assert "128: 128-255" in few
    many = run("--model", "llama-3-8b", "-dp", "64").stdout
    assert "0-63" in many
    assert "\n1 " not in many


def test_explained() -> None:
    done = run(*V3, "--explain")
    assert done.exit_code == 0
    assert "Attention weights are sharded over the 2 ranks" in " ".join(done.stdout.split())


def test_picture_and_page_are_written(tmp_path: Path) -> None:
    svg, page = tmp_path / "a.svg", tmp_path / "a.html"
    done = run(*V3, "--svg", str(svg), "--html", str(page))
    assert (done.exit_code, done.stdout) == (0, "")
    assert svg.read_text().startswith("<svg")
    assert page.read_text().startswith("<!doctype html>")
    assert str(svg) in done.stderr


def test_a_file_that_cannot_be_written_is_an_error_that_is_told(tmp_path: Path) -> None:
    done = run(*V3, "--svg", str(tmp_path / "none" / "a.svg"))
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_config_alone_is_enough(tmp_path: Path, what: str) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((model_folder("demo") / "config.json").read_bytes())
    made = answer("--model", str(tmp_path if what == "folder" else config))
    assert made["ranks"] == answer("--model", "demo")["ranks"]


def test_a_quantized_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    values = json.loads((model_folder("demo") / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "fp8"}}))
    (note,) = answer("--model", str(tmp_path))["notes"]
    assert "quantized" in note


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("tensor_parallel_size", ("--model", "deepseek-v3", "-tp", "3")),
        ("model", ("--model", "deepseek-v9")),
        ("model", ("--model", "./nowhere")),
        ("model", ("--model", "~nobody-lives-here/model")),
        ("model", ("--model", "a" * 300)),
        ("num_gpus", ("--model", "llama-3-8b", "-tp", "8", "--num-gpus", "4")),
        ("gpu_memory", ("--model", "llama-3-8b", "--gpu-memory", "much")),
        ("gpu_memory_utilization", ("--model", "llama-3-8b", "--gpu-memory-utilization", "1.5")),
        ("dtype", ("--model", "llama-3-8b", "--dtype", "fp8")),
        ("kv_cache_dtype", ("--model", "llama-3-8b", "--kv-cache-dtype", "fp8")),
        ("max_model_len", ("--model", "llama-3-8b", "--max-model-len", "1000000")),
        ("enable_expert_parallel", ("--model", "llama-3-8b", "--enable-expert-parallel")),
        ("block_size", ("--model", "llama-3-8b", "--block-size", "0")),
    ],
)
def test_what_cannot_be_is_refused_with_status_2(field: str, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"drumline: InvalidConfig: {field}: found ")
    assert "; valid: " in done.stderr
