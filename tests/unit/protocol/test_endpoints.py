from __future__ import annotations

import socket
from pathlib import Path

import pytest

from drumline.protocol.endpoints import MAX_IPC_PATH_BYTES, bind_tcp, check_endpoint, clear_stale_path
from drumline.protocol.errors import InvalidConfig


@pytest.mark.parametrize(
    "endpoint",
    [
        "ipc:///run/drumline/client.sock",
        "ipc:///" + "x" * (MAX_IPC_PATH_BYTES - 1),
        "tcp://127.0.0.1:0",
        "tcp://127.3.2.1:65535",
        "tcp://localhost:5555",
        "tcp://[::1]:5555",
    ],
)
def test_endpoints_of_this_machine_are_accepted(endpoint: str) -> None:
    check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://[::]:5555", "tcp://:5555"])
def test_wildcards_are_refused_by_name(endpoint: str) -> None:
    with pytest.raises(InvalidConfig, match="a wildcard is never bound"):
        check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://10.0.0.1:5555", "tcp://[2001:db8::1]:5555", "tcp://example.org:5555"])
def test_other_interfaces_are_refused_for_want_of_keys(endpoint: str) -> None:
    with pytest.raises(InvalidConfig, match="CURVE keys") as caught:
        check_endpoint(endpoint)
    assert caught.value.field == "endpoint"


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "ipc",
        "ipc://",
        "ipc://relative/path",
        "ipc://*",
        "ipc:///with\0zero",
        "ipc://@abstract",
        "inproc://x",
        "udp://127.0.0.1:1",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:*",
        "tcp://127.0.0.1:\uff15",
        "tcp://::1:5555",
    ],
)
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidConfig):
        check_endpoint(endpoint)


def test_a_path_over_the_limit_says_both_lengths() -> None:
    path = "/" + "é" * 50
    with pytest.raises(InvalidConfig, match=r"\(101 bytes\).*at most 100 bytes"):
        check_endpoint("ipc://" + path)


def test_a_socket_that_nobody_listens_on_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    clear_stale_path(f"ipc://{path}")
    assert not path.exists()
    clear_stale_path(f"ipc://{path}")


def test_a_socket_that_somebody_listens_on_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        with pytest.raises(InvalidConfig, match="no other process listens"):
            clear_stale_path(f"ipc://{path}")
    assert path.exists()


def test_a_plain_file_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("keep")
    with pytest.raises(InvalidConfig, match="nothing else stands"):
        clear_stale_path(f"ipc://{path}")
    assert path.read_text() == "keep"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="existing folder"):
        clear_stale_path(f"ipc://{tmp_path}/none/s")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1"])
def test_a_port_is_bound_before_it_is_known(host: str) -> None:
    bound, port = bind_tcp(host)
    with bound:
        assert bound.getsockname()[:2] == (host, port)
        with socket.create_connection((host, port), timeout=5.0):
            pass
        with pytest.raises(InvalidConfig, match="in use") as caught:
            bind_tcp(host, port)
        assert caught.value.field == "port"
    again, same = bind_tcp(host, port)
    again.close()
    assert same == port


def test_free_ports_are_never_handed_out_twice() -> None:
    held = [bind_tcp("127.0.0.1") for _ in range(200)]
    for bound, _ in held:
        bound.close()
    assert len({port for _, port in held}) == 200


@pytest.mark.parametrize(
    ("host", "port", "field"),
    [
        ("0.0.0.0", 0, "host"),
        ("::", 0, "host"),
        ("localhost", 0, "host"),
        ("127.0.0.1", 65536, "port"),
        ("127.0.0.1", -1, "port"),
        ("192.0.2.1", 0, "host"),
    ],
)
def test_what_cannot_be_bound_is_refused_by_name(host: str, port: int, field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        bind_tcp(host, port)
    assert caught.value.field == field
    assert caught.value.info.valid
