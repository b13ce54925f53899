"""What the processes of an engine tell each other over their pipes, and the folder they share."""

from __future__ import annotations

import errno
import os
import struct
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from drumline.engine.config import EngineConfig
from drumline.engine.launch.forkserver_pipe import MAX_FRAME_BYTES, ReportReader
from drumline.engine.launch.local import import_path, make_runtime_dir
from drumline.engine.launch.order import Order, Report, encode_line, read_order, read_report, remove_runtime_dir
from drumline.protocol.endpoints import MAX_IPC_PATH_BYTES, check_endpoint
from drumline.protocol.errors import ErrorInfo, InvalidConfig, ProtocolError

ORDER = Order(
    config=EngineConfig("demo"),
    runtime_dir="/tmp/drumline-x",
    client_endpoint="ipc:///tmp/drumline-x/client.sock",
    worker_endpoint="ipc:///tmp/drumline-x/worker.sock",
    supervisor_token="s3cret",
    owner_pid=1,
)


def order_from(data: bytes) -> Order:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, data)
        os.close(write_end)
        return read_order(read_end)
    finally:
        os.close(read_end)


def test_an_order_arrives_as_it_was_given() -> None:
    assert order_from(encode_line(ORDER)) == ORDER


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "ended after 0 bytes"),
        (encode_line(ORDER)[:-5], "stdin ended"),
        (b"{}\n", "no valid order"),
        (b"\xff\n", "no valid order"),
        (encode_line(ORDER).replace(b'"data_parallel_size":1', b'"data_parallel_size":-1'), "found -1"),
    ],
)
def test_what_is_no_order_is_refused_with_the_reason(data: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        order_from(data + (b"\n" if text == "found -1" and not data.endswith(b"\n") else b""))


def test_reports_are_told_from_what_a_library_prints() -> None:
    error = ErrorInfo(kind="start_failed", text="no", rank=3)
    assert read_report(encode_line(Report("failed", 7, error))) == Report("failed", 7, error)
    assert read_report(b"Loading checkpoint shards\n") is None
    assert read_report(b"[1, 2]\n") is None


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def test_forkserver_reports_are_cut_from_the_stream_wherever_it_breaks() -> None:
    stream = b"".join(
        frame(msgspec.msgpack.encode(value))
        for value in ({"ready": 5}, {"spawned": [1, 50]}, {"exited": [1, 50, 0, 9, "tail"]})
    )
    reader = ReportReader()
    reports = [report for byte in stream for report in reader.feed(bytes([byte]))]
    assert [report.ready for report in reports] == [5, None, None]
    assert reports[1].spawned == (1, 50)
    assert reports[2].exited == (1, 50, 0, 9, "tail")
    assert len(ReportReader().feed(stream)) == 3


@pytest.mark.parametrize(
    "data",
    [frame(b"\xc1"), struct.pack(">I", MAX_FRAME_BYTES + 1), frame(msgspec.msgpack.encode({"exited": [1]}))],
)
def test_a_stream_that_holds_no_reports_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ReportReader().feed(data)


def test_the_runtime_folder_is_private_and_leaves_room_for_socket_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = make_runtime_dir()
    assert Path(path).parent in (tmp_path, Path(tempfile.gettempdir()), Path("/tmp"))
    assert Path(path).stat().st_mode & 0o777 == 0o700
    check_endpoint(f"ipc://{path}/worker.sock")
    remove_runtime_dir(path)
    assert not Path(path).exists()


def test_a_runtime_folder_with_a_long_path_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * MAX_IPC_PATH_BYTES)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    path = make_runtime_dir()
    remove_runtime_dir(path)
    assert not path.startswith(str(deep))


def test_without_a_usable_folder_the_paths_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * MAX_IPC_PATH_BYTES)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr("drumline.engine.launch.local.RUNTIME_PREFIX", "y" * MAX_IPC_PATH_BYTES)
    with pytest.raises(InvalidConfig, match=str(deep)):
        make_runtime_dir()


def test_only_a_folder_of_ours_is_ever_removed(tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.mkdir()
    remove_runtime_dir(str(other))
    link = tmp_path / "drumline-link"
    link.symlink_to(other)
    remove_runtime_dir(str(link))
    remove_runtime_dir(str(tmp_path / "drumline-none"))
    assert other.is_dir()


def test_a_folder_that_is_full_is_passed_over_and_one_that_is_all_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = tempfile.mkdtemp

    def full(**where: str) -> str:
        if where["dir"] == str(tmp_path) or everything:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(**where)

    everything = False
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    path = make_runtime_dir()
    remove_runtime_dir(path)
    assert Path(path).parent == Path("/tmp")
    everything = True
    with pytest.raises(InvalidConfig, match="No space left on device"):
        make_runtime_dir()


def test_a_folder_whose_name_is_not_utf8_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        odd = Path(os.fsdecode(os.fsencode(parent) + b"/\xff"))
        odd.mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(odd))
        path = make_runtime_dir()
        remove_runtime_dir(path)
        assert not path.startswith(str(odd))


def test_the_import_path_of_an_app_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "beside", "/usr/lib/x", "/usr/lib/x", "/not/\udcff/text"])
    assert import_path() == (str(tmp_path), str(tmp_path / "beside"), "/usr/lib/x")
