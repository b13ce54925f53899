"""``drumline generate`` as a process: its output, its files, its signals and its exit status."""

import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import drumline.engine.config

pytestmark = pytest.mark.timeout(120)

PROMPT = 'The "with" statement is used to'
COMMAND = [sys.executable, "-c", "from drumline.engine.cli import main; main()", "generate"]
SMALL = ["--max-model-len", "256", "--num-gpu-blocks-override", "128", "--max-num-seqs", "4"]
DEMO = Path(drumline.engine.config.__file__).parent / "demo"


def environment(folder: Path) -> dict[str, str]:
    """Sockets and whatever else is temporary go below ``folder``, so that leftovers are seen."""
    return {**os.environ, "TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path: that of a socket has little room."""
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/drumcli-XXXXXX"], text=True).strip())
    yield folder
    left = [path.name for path in folder.iterdir()]
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert left == []


def generate(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags], env=environment(folder), capture_output=True, text=True, timeout=100, check=False
    )


@contextmanager
def running(folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *flags], env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_json_alone_is_on_stdout_with_everything_that_was_promised(temporary: Path) -> None:
    done = generate(
        temporary, "--prompt", PROMPT, "--prompt-token-ids", "5,6", "--max-tokens", "6", "--temperature", "0",
        "--ignore-eos", "--json", "--logprobs", "1", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["model"] == "demo"
    assert {"start_s", "total_s", "tokens_per_s"} <= document["timings"].keys()
    assert document["counters"]
    first, second = document["outputs"]
    assert (first["index"], first["prompt"], first["finish_reason"]) == (0, PROMPT, "length")
    assert (second["prompt"], second["prompt_token_ids"]) == (None, [5, 6])
    for output in (first, second):
        assert {"request_id", "prompt_token_ids", "token_ids", "text", "ttft_s", "latency_s"} <= output.keys()
        assert len(output["token_ids"]) == len(output["logprobs"]) == 6
        assert 0 < output["ttft_s"] <= output["latency_s"]


def test_text_without_a_terminal_is_the_text_alone(temporary: Path) -> None:
    flags = ["--prompt", PROMPT, "--max-tokens", "8", "--temperature", "0.8", "--seed", "3", "--ignore-eos", *SMALL]
    text = generate(temporary, *flags)
    assert text.returncode == 0, text.stderr
    assert "\x1b" not in text.stdout + text.stderr
    assert text.stdout.endswith("\n")
    both = generate(temporary, *flags, "--prompt", "Another", "--json")
    first = json.loads(both.stdout)["outputs"][0]
    assert text.stdout.rstrip("\n") == first["text"].rstrip("\n")


def test_a_batch_answers_every_line_and_says_what_was_wrong_with_the_bad_ones(temporary: Path, tmp_path: Path) -> None:
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": f"{PROMPT} {number}", "request_id": f"r{number}"} for number in range(10)]
    bad = ['{"prompt": ""}', "not json", '{"prompt": "x", "top_p": 7}', '{"prompt": "x", "request_id": "r0"}']
    bad.append(json.dumps({"prompt_token_ids": [5] * 300}))
    text = "\n".join([*map(json.dumps, lines), "", *bad, '{"prompt_token_ids": [9], "max_tokens": 2, "n": 2}'])
    prompts.write_text(text + "\n")
    done = generate(
        temporary, "--input-file", str(prompts), "--output-file", str(results), "--max-tokens", "3", "--ignore-eos",
        *SMALL,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    found = lines_of(results)
    good = {(line["request_id"], line["index"]): line for line in found if "error" not in line}
    assert {key[0] for key in good} == {f"r{number}" for number in range(10)} | {"line-17"}
    assert [len(good["line-17", index]["token_ids"]) for index in (0, 1)] == [2, 2]
    errors = {line["line"]: line["error"] for line in found if "error" in line}
    assert sorted(errors) == [12, 13, 14, 15, 16]
    assert (errors[14]["kind"], errors[14]["field"], errors[14]["found"]) == ("invalid_request", "top_p", "7")
    assert "300" in errors[16]["text"]
    assert "256" in errors[16]["text"]
    assert "11 of 16 lines finished, 5 failed" in done.stderr


def test_a_terminal_sees_a_progress_bar_and_ctrl_c_at_it_ends_the_batch(temporary: Path, tmp_path: Path) -> None:
    prompts, results, screen = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", tmp_path / "screen"
    prompts.write_text((json.dumps({"prompt": PROMPT, "max_tokens": 20}) + "\n") * 500)
    command = [*COMMAND, "--input-file", str(prompts), "--output-file", str(results), "--ignore-eos", *SMALL]
    terminal, inside = pty.openpty()
    with (
        screen.open("wb") as seen,
        subprocess.Popen(
            ["setsid", "--ctty", *command], env=environment(temporary), stdin=inside, stdout=inside, stderr=inside
        ) as process,
    ):
        os.close(inside)
        deadline = time.monotonic() + 60
        while len(lines_of(results)) < 3 and time.monotonic() < deadline and process.poll() is None:
            seen.write(_screen(terminal))
        os.write(terminal, b"\x03")
        while process.poll() is None and time.monotonic() < deadline:
            seen.write(_screen(terminal))
    os.close(terminal)
    text = screen.read_text(errors="replace")
    assert process.returncode == 130, text
    assert "/500" in text
    assert "tokens" in text
    assert "Traceback" not in text


def _screen(terminal: int) -> bytes:
    """What the terminal shows, waiting for a moment at most."""
    ready, _, _ = select.select([terminal], [], [], 0.1)
    try:
        return os.read(terminal, 65536) if ready else b""
    except OSError:  # the other end is closed
        return b""


def test_an_interrupted_batch_keeps_its_finished_lines(temporary: Path, tmp_path: Path) -> None:
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    with prompts.open("w") as lines:
        for number in range(400):
            lines.write(json.dumps({"prompt": PROMPT, "max_tokens": 2 if number % 2 else 200}) + "\n")
    with running(
        temporary, "--input-file", str(prompts), "--output-file", str(results), "--ignore-eos", *SMALL
    ) as process:
        deadline = time.monotonic() + 60
        while len(lines_of(results)) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    finished = lines_of(results)
    assert 3 <= len(finished) < 400
    assert all(line["finish_reason"] == "length" for line in finished)
    assert f"{len(finished)} of 400 lines finished" in stderr


def test_ctrl_c_while_starting_leaves_nothing(temporary: Path) -> None:
    with running(temporary, "--prompt", PROMPT, *SMALL) as process:
        assert process.stderr is not None
        assert "starting" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_reader_that_leaves_ends_the_command_without_a_word_of_python(temporary: Path) -> None:
    command = " ".join(f"'{part}'" for part in [*COMMAND, "--prompt", PROMPT, "--max-tokens", "200", *SMALL])
    script = f"set -o pipefail; {command} --n 8 --ignore-eos | head -n 1"
    done = subprocess.run(
        ["bash", "-c", script], env=environment(temporary), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 128 + signal.SIGPIPE, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "status", "named"),
    [
        (["--prompt", "x", "--model", "/nowhere"], 1, "InvalidConfig: model: found /nowhere"),
        (["--prompt", "x", "--max-tokens", "-1"], 1, "InvalidRequest: max_tokens: found -1"),
        (["--prompt", "x", "-dp", "0"], 1, "InvalidConfig: data_parallel_size: found 0"),
        (["--prompt", "x", "-tp", "3"], 1, "InvalidConfig: tensor_parallel_size: found 3"),
        ([], 2, "--prompt"),
        (["--prompt", "x", "--input-file", "/dev/null"], 2, "--input-file"),
        (["--prompt", "x", "--max-tokens", "many"], 2, "--max-tokens"),
        (["--input-file", "/nowhere.jsonl", "--output-file", "/dev/null"], 2, "/nowhere.jsonl"),
    ],
)
def test_what_cannot_work_is_told_in_one_line_with_its_status(
    temporary: Path, flags: list[str], status: int, named: str
) -> None:
    done = generate(temporary, *flags)
    assert done.returncode == status
    assert done.stdout == ""
    assert named in done.stderr.splitlines()[-1], done.stderr


def test_a_model_without_tokenizer_serves_token_ids_and_refuses_text(temporary: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6]}\n{"prompt": "text"}\n')
    done = generate(
        temporary, "--model", str(tmp_path), "--input-file", str(prompts), "--output-file", str(results), *SMALL
    )
    assert done.returncode == 1, done.stderr
    served, refused = sorted(lines_of(results), key=lambda line: str(line["request_id"]))
    assert (served["text"], len(served["token_ids"])) == ("", 16)
    assert "tokenizer.json" in refused["error"]["text"]


def test_a_batch_may_come_through_a_pipe(temporary: Path, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    lines = '{"prompt": "a", "max_tokens": 2}\r\n\r\n{"prompt": "b", "max_tokens": 2}'
    flags = ["--input-file", "/dev/stdin", "--output-file", str(results), *SMALL]
    done = subprocess.run(
        [*COMMAND, *flags], input=lines, env=environment(temporary), capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 lines finished" in done.stderr
    assert sorted(line["request_id"] for line in lines_of(results)) == ["line-1", "line-3"]


def open_for_writing(pipe: Path, reader: subprocess.Popen[str]) -> int:
    """The write end of a FIFO, once ``reader`` has opened the other end."""
    deadline = time.monotonic() + 60
    while reader.poll() is None and time.monotonic() < deadline:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        time.sleep(0.02)
    raise AssertionError(f"nobody opened {pipe}; exit status {reader.poll()}")


def test_ctrl_c_ends_the_wait_for_a_pipe_that_says_nothing(temporary: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    os.mkfifo(silent)
    with running(
        temporary, "--input-file", str(silent), "--output-file", str(tmp_path / "out.jsonl"), *SMALL
    ) as process:
        writer = open_for_writing(silent, process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        os.close(writer)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("flags", "redirection", "named"),
    [
        ("--prompt x", "> /dev/full", "stdout cannot be written: No space left on device"),
        ("--prompt x --json", "> /dev/full", "stdout cannot be written: No space left on device"),
        ("--prompt x", ">&-", "stdout cannot be written: Bad file descriptor"),
        ("--input-file {lines} --output-file /dev/full", "", "output file cannot be written: No space left on device"),
    ],
)
def test_output_that_cannot_be_written_is_told_in_one_line(
    temporary: Path, tmp_path: Path, flags: str, redirection: str, named: str
) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "x"}\n')
    command = " ".join(f"'{part}'" for part in [*COMMAND, *SMALL])
    script = f"{command} {flags.format(lines=lines)} --max-tokens 2 {redirection}"
    done = subprocess.run(
        ["bash", "-c", script], env=environment(temporary), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1, done.stderr
    assert named in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


def test_stdin_and_stderr_may_be_closed(temporary: Path) -> None:
    command = " ".join(f"'{part}'" for part in [*COMMAND, *SMALL])
    script = f"{command} --prompt x --max-tokens 2 --temperature 0 <&- 2>&-"
    done = subprocess.run(
        ["bash", "-c", script], env=environment(temporary), capture_output=True, timeout=100, check=False
    )
    assert done.returncode == 0
    assert done.stdout
