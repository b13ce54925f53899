"""No two coordinators of a runtime directory have the same term."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from drumline.engine.errors import StartFailed
from drumline.engine.terms import raise_term


def test_terms_rise_by_one_and_to_at_least_what_is_asked_for(tmp_path: Path) -> None:
    assert raise_term(tmp_path) == 1
    assert raise_term(tmp_path) == 2
    assert raise_term(tmp_path, at_least=10) == 10
    assert raise_term(str(tmp_path), at_least=3) == 11
    assert (tmp_path / "term").stat().st_mode & 0o777 == 0o600


def test_processes_that_raise_it_at_once_get_terms_of_their_own(tmp_path: Path) -> None:
    program = (
        "import sys; from drumline.engine.terms import raise_term\nfor _ in range(50): print(raise_term(sys.argv[1]))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    terms = [int(line) for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert sorted(terms) == list(range(1, 151))


def test_a_lock_that_somebody_keeps_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    raise_term(tmp_path)
    with (tmp_path / "term").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StartFailed, match=r"term: another process has kept it locked for 0.05 s"):
            raise_term(tmp_path, deadline_s=0.05)
    assert raise_term(tmp_path) == 2


@pytest.mark.parametrize("found", ["7\n", "x" * 21, "0" * 19 + "x\n", "0" * 30])
def test_a_file_that_holds_something_else_is_named(tmp_path: Path, found: str) -> None:
    (tmp_path / "term").write_text(found)
    with pytest.raises(StartFailed, match="instead of the highest term so far"):
        raise_term(tmp_path)
    assert (tmp_path / "term").read_text() == found


def test_an_empty_file_is_one_of_whoever_died_before_writing(tmp_path: Path) -> None:
    (tmp_path / "term").touch()
    assert raise_term(tmp_path) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="nowhere/term: No such file or directory"):
        raise_term(tmp_path / "nowhere")
