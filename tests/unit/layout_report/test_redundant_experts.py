"""Layouts with redundant copies of experts: who holds which, in how many bytes, before and while they move."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from drumline.engine.cli import main
from drumline.engine.config import EngineConfig, EPLBConfig, ParallelConfig
from drumline.engine.layout_report.explain import explain
from drumline.engine.layout_report.question import ask
from drumline.engine.layout_report.report import report
from drumline.engine.layout_report.running import layout_facts, report_of
from drumline.engine.resolve import resolve

GIB = 1 << 30


def config(redundant: int, *, balanced: bool = True) -> EngineConfig:
    return EngineConfig(
        "demo",
        parallel=ParallelConfig(
            data_parallel_size=2,
            enable_expert_parallel=True,
            enable_eplb=balanced,
            eplb_config=EPLBConfig(num_redundant_experts=redundant),
        ),
    )


def test_copies_are_listed_weighed_and_explained() -> None:
    question = ask(config(4))
    answer, plain = report(question), report(ask(config(0)))
    first, second = answer.ranks
    assert first.experts[0] == tuple(range(10))
    assert second.experts[0] == (0, 1, 2, 3, *range(10, 16))
    assert (first.redundant_experts[0], second.redundant_experts[0]) == ((), (0, 1, 2, 3))
    assert first.weight_bytes["experts"] * 8 == plain.ranks[0].weight_bytes["experts"] * 10
    assert (answer.config.enable_eplb, answer.config.num_redundant_experts) == (True, 4)
    experts = next(topic.text for topic in explain(question, answer) if topic.title == "Experts")
    assert "4 redundant copies, of experts 0-3 to begin with" in experts


def test_staging_buffers_of_one_layer_come_out_of_the_memory_for_kv() -> None:
    one = report(ask(config(4), gpu_memory=GIB)).ranks[0]
    still = report(ask(config(0, balanced=False), gpu_memory=GIB)).ranks[0]
    assert one.staging_bytes * one.moe_layers == one.weight_bytes["experts"]
    assert still.staging_bytes == 0
    assert one.kv_bytes_free == int(GIB * 0.9) - one.total_weight_bytes - one.staging_bytes


def test_a_running_engine_tells_the_placement_of_now_with_the_slots_of_who_is_left() -> None:
    resolved = resolve(config(4))
    placement = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    made = report_of(layout_facts(1, resolved, placement, slots=np.array([16, 0], dtype=np.int32)))
    assert made.ranks[0].experts[0] == tuple(range(16))
    assert made.ranks[1].experts[0] == ()
    assert made.ranks[1].weight_bytes.get("experts", 0) == 0


def test_the_command_takes_redundant_experts_and_a_placement(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    rows = [[*range(15, -1, -1), 15, 14]] * 4
    path.write_text(json.dumps({"physical_to_logical": rows}))
    flags = "--model demo -dp 2 --enable-expert-parallel --enable-eplb --num-redundant-experts 2 --json"
    done = CliRunner().invoke(main, ["layout", *flags.split(), "--init-expert-placement", str(path)])
    assert done.exit_code == 0, done.stderr
    ranks = json.loads(done.stdout)["ranks"]
    assert ranks[0]["experts"]["0"] == list(range(7, 16))
    assert ranks[1]["experts"]["0"] == [*range(7), 14, 15]
    assert ranks[1]["redundant_experts"]["0"] == [14, 15]


def test_the_command_refuses_redundant_experts_that_cannot_be(tmp_path: Path) -> None:
    flags = "layout --model demo -dp 2 --enable-expert-parallel --num-redundant-experts"
    for more, said in (("17 --enable-eplb", "0 to 16"), ("2", "0 while enable_eplb is False")):
        done = CliRunner().invoke(main, [*flags.split(), *more.split()])
        assert (done.exit_code, done.stdout) == (2, "")
        assert "num_redundant_experts" in done.stderr
        assert said in done.stderr
