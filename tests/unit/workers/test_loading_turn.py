"""At most so many ranks load at once, and a turn is free again when its holder ends."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from drumline.protocol.errors import InvalidConfig, StartFailed
from drumline.protocol.messages import WorkerConfig
from drumline.workers.loading_turn import loading_turn

CONFIG = WorkerConfig(
    model="/m",
    dtype="float32",
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=0,
    kv_cache_memory_bytes=0,
    gpu_memory_utilization=0.9,
    data_parallel_size=4,
)
RANK = """
import sys, time
import msgspec
from drumline.protocol.messages import WorkerConfig
from drumline.workers.loading_turn import loading_turn

config = msgspec.json.decode(sys.argv[1], type=WorkerConfig)
with loading_turn(config, lambda: None, 60.0) as number:
    print("in", number, time.monotonic(), flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()
    time.sleep(0.05)
    print("out", number, time.monotonic(), flush=True)
"""


def with_turns(folder: Path, turns: int) -> WorkerConfig:
    return msgspec.structs.replace(CONFIG, max_parallel_loading_workers=turns, runtime_dir=str(folder))


def rank_process(config: WorkerConfig, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RANK, msgspec.json.encode(config).decode(), *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def no_wait() -> None:
    pass


def test_without_a_limit_nobody_waits_and_no_file_is_made(tmp_path: Path) -> None:
    with loading_turn(with_turns(tmp_path, 0), no_wait) as one, loading_turn(with_turns(tmp_path, 0), no_wait) as other:
        assert (one, other) == (None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("turns", [1, 2])
def test_six_processes_load_no_more_than_their_turns_at_once(tmp_path: Path, turns: int) -> None:
    ranks = [rank_process(with_turns(tmp_path, turns)) for _ in range(6)]
    moments: list[tuple[float, int]] = []
    for rank in ranks:
        lines = rank.communicate(timeout=60)[0].splitlines()
        assert rank.returncode == 0
        assert [line.split()[0] for line in lines] == ["in", "out"]
        moments += [(float(line.split()[2]), 1 if line.startswith("in") else -1) for line in lines]
    loading = most = 0
    for _, change in sorted(moments):
        loading += change
        most = max(most, loading)
    assert loading == 0
    assert 1 <= most <= turns


def test_a_killed_rank_gives_its_turn_back(tmp_path: Path) -> None:
    config = with_turns(tmp_path, 1)
    with rank_process(config, "hold") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith("in 0")
        assert not is_free(config)
        holder.kill()
        holder.wait(10)
    assert is_free(config)


def is_free(config: WorkerConfig) -> bool:
    try:
        with loading_turn(config, no_wait, 0.0):
            return True
    except StartFailed:
        return False


def test_turns_that_stay_taken_are_given_up_at_the_deadline(tmp_path: Path) -> None:
    config = with_turns(tmp_path, 2)
    with ExitStack() as held:
        assert [held.enter_context(loading_turn(config, no_wait)) for _ in range(2)] == [0, 1]
        began = time.monotonic()
        with pytest.raises(StartFailed, match=r"none of 2 turns .* within 0\.2 s"), loading_turn(config, no_wait, 0.2):
            pass
        assert 0.2 <= time.monotonic() - began < 5.0
    with loading_turn(config, no_wait, 0.0) as number:
        assert number == 0


def test_the_wait_ends_with_what_the_caller_raises(tmp_path: Path) -> None:
    config = with_turns(tmp_path, 1)
    looks = 0

    def give_up_at_the_third() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise InterruptedError

    with loading_turn(config, no_wait), pytest.raises(InterruptedError), loading_turn(config, give_up_at_the_third):
        pass
    assert looks == 3


def test_an_error_while_loading_gives_the_turn_back(tmp_path: Path) -> None:
    config = with_turns(tmp_path, 1)
    with pytest.raises(MemoryError), loading_turn(config, no_wait):
        raise MemoryError
    with loading_turn(config, no_wait, 0.0) as number:
        assert number == 0


def test_a_folder_that_is_not_there_is_refused_by_the_setting(tmp_path: Path) -> None:
    config = with_turns(tmp_path / "elsewhere", 1)
    with pytest.raises(InvalidConfig, match="elsewhere") as caught, loading_turn(config, no_wait):
        pass
    assert caught.value.info.field == "max_parallel_loading_workers"
