"""The flags of a command and the configuration that they make."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from drumline.engine.cli import main
from drumline.engine.commands.engine_options import ENGINE_OPTIONS, engine_config, engine_options
from drumline.engine.commands.parallel_options import describe_sizes
from drumline.engine.config import CacheConfig, EngineConfig, EPLBConfig, ParallelConfig, SchedulerConfig
from drumline.protocol.errors import InvalidConfig


def parsed(*arguments: str) -> EngineConfig:
    found: list[EngineConfig] = []

    @click.command()
    @engine_options
    def command(**flags: Any) -> None:
        found.append(engine_config(flags, None))

    done = CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return found[0]


def test_without_flags_every_setting_has_its_default() -> None:
    assert parsed() == EngineConfig("demo")


def test_every_parallel_and_cache_setting_has_a_flag() -> None:
    assert set(ParallelConfig.__struct_fields__) <= set(ENGINE_OPTIONS)
    assert set(CacheConfig.__struct_fields__) <= set(ENGINE_OPTIONS)
    assert {"dtype", "max_model_len"} <= set(ENGINE_OPTIONS)


def test_each_flag_sets_its_own_field() -> None:
    flags = (
        "-tp 4 -pp 3 -dp 2 --enable-expert-parallel --expert-placement-strategy round_robin --enable-dp-attention "
        "--pipeline-partition 2,3,2 --all2all-backend all_to_all --distributed-executor-backend mp "
        "--data-parallel-size-local 1 --data-parallel-rank 1 --data-parallel-rank-local 2 "
        "--data-parallel-master-ip 127.0.0.2 --data-parallel-master-port 29500 --data-parallel-rpc-port 29550 "
        "--data-parallel-backend mp --max-parallel-loading-workers 2 --worker-cls a.B --worker-extension-cls c:D "
        "--distributed-timeout 7.5 --dtype bfloat16 --kv-cache-dtype float32 --max-num-seqs 8"
    )
    assert parsed(*flags.split()) == EngineConfig(
        "demo",
        dtype="bfloat16",
        parallel=ParallelConfig(
            tensor_parallel_size=4,
            pipeline_parallel_size=3,
            data_parallel_size=2,
            enable_expert_parallel=True,
            expert_placement_strategy="round_robin",
            enable_dp_attention=True,
            pipeline_partition=(2, 3, 2),
            all2all_backend="all_to_all",
            distributed_executor_backend="mp",
            data_parallel_size_local=1,
            data_parallel_rank=1,
            data_parallel_rank_local=2,
            data_parallel_master_ip="127.0.0.2",
            data_parallel_master_port=29500,
            data_parallel_rpc_port=29550,
            data_parallel_backend="mp",
            max_parallel_loading_workers=2,
            worker_cls="a.B",
            worker_extension_cls="c:D",
            distributed_timeout=7.5,
        ),
        cache=CacheConfig(kv_cache_dtype="float32"),
        scheduler=SchedulerConfig(max_num_seqs=8),
    )


BALANCED = ("--enable-expert-parallel", "--enable-eplb")


def test_the_balance_of_experts_has_flags() -> None:
    flags = (
        "--num-redundant-experts 4 --init-expert-placement p.json --eplb-window-size 10 --eplb-step-interval 20 "
        "--eplb-log-balancedness --eplb-policy global --eplb-max-moved 0.5 --eplb-min-gain 0 "
        "--eplb-bytes-per-step 1MiB --eplb-load-interval 5 --eplb-record r.npz"
    )
    config = EPLBConfig(
        num_redundant_experts=4,
        init_placement="p.json",
        window_size=10,
        step_interval=20,
        log_balancedness=True,
        policy="global",
        max_moved=0.5,
        min_gain=0.0,
        bytes_per_step=1 << 20,
        load_interval=5,
        record_path="r.npz",
    )
    parallel = parsed(*BALANCED, *flags.split()).parallel
    assert parallel == ParallelConfig(enable_expert_parallel=True, enable_eplb=True, eplb_config=config)
    assert set(config.__struct_fields__) == {name for name in config.__struct_fields__ if getattr(config, name)} | {
        "min_gain"
    }


def test_the_balance_of_experts_may_be_one_json_object_and_flags_come_first() -> None:
    text = '{"window_size": 7, "num_redundant_experts": 2, "bytes_per_step": 4096}'
    parallel = parsed(*BALANCED, "--eplb-config", text, "--num-redundant-experts", "3").parallel
    assert parallel.eplb_config == EPLBConfig(window_size=7, num_redundant_experts=3, bytes_per_step=4096)


@pytest.mark.parametrize(
    ("text", "field"),
    [("{", "eplb_config"), ("[1]", "eplb_config"), ('{"use_async": true}', "use_async"), ('{"policy": 3}', "policy")],
)
def test_json_that_is_no_configuration_is_refused(text: str, field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parsed(*BALANCED, "--eplb-config", text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--enable-eplb",), "enable_eplb"),
        (("--num-redundant-experts", "1"), "num_redundant_experts"),
        ((*BALANCED, "--eplb-bytes-per-step", "a lot"), "bytes_per_step"),
        (("--dtype", "half"), "dtype"),
        (("--kv-cache-dtype", "fp8"), "kv_cache_dtype"),
        (("--distributed-executor-backend", "ray"), "distributed_executor_backend"),
        (("-pp", "2", "--pipeline-partition", "1,2,3"), "pipeline_partition"),
    ],
)
def test_a_value_that_is_refused_is_refused_by_the_settings(flags: tuple[str, ...], field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parsed(*flags)
    assert caught.value.info.field == field


def test_a_partition_that_is_no_list_of_numbers_is_wrong_usage() -> None:
    with pytest.raises(click.BadParameter, match="2,3,2"):
        parsed("-pp", "2", "--pipeline-partition", "two,two")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, "1 rank"),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, "2 ranks, expert parallel"),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True},
            "4 ranks, tensor parallel 2, pipeline 2, expert parallel",
        ),
        (
            {"tensor_parallel_size": 4, "data_parallel_size": 2, "enable_dp_attention": True},
            "8 ranks, tensor parallel 4, data parallel 2, data parallel attention",
        ),
        (
            {
                "data_parallel_size": 2,
                "enable_expert_parallel": True,
                "enable_eplb": True,
                "eplb_config": EPLBConfig(num_redundant_experts=4),
            },
            "2 ranks, expert parallel, experts balanced, 4 redundant",
        ),
    ],
)
def test_the_start_line_says_what_is_more_than_one(sizes: dict[str, Any], text: str) -> None:
    assert describe_sizes(ParallelConfig(**sizes)) == text


@pytest.mark.parametrize("command", ["generate", "layout"])
@pytest.mark.parametrize("name", sorted(ParallelConfig.not_yet))
def test_a_flag_of_vllms_that_is_not_there_yet_is_refused_by_name(name: str, command: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    for arguments in ([flag], [flag, "4"]):
        done = CliRunner().invoke(main, [command, "--model", "demo", *arguments])
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"{name} is not in this version; {ParallelConfig.not_yet[name]}" in done.stderr
    assert flag not in CliRunner().invoke(main, [command, "--help"]).stdout


def test_the_journal_has_a_file_or_is_left_out() -> None:
    assert parsed("--journal", "/x/j.sqlite").journal == "/x/j.sqlite"
    assert parsed("--no-journal").journal == "off"
    with pytest.raises(InvalidConfig) as caught:
        parsed("--no-journal", "--journal", "/x/j.sqlite")
    assert caught.value.field == "no_journal"
