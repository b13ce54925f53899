"""The class of a rank's worker from what the configuration names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.workers import Worker
from drumline.workers.worker_class import worker_class

HERE = __name__


class Mine(Worker):
    def mine(self) -> str:
        return "mine"


class Extension:
    def extra(self) -> str:
        return "extra"


class Clashing:
    def run(self) -> int:
        return 1

    def _step(self) -> None: ...

    def model_runner(self) -> None: ...

    def fine(self) -> None: ...


class Answering:
    def ping(self) -> str:
        return "pong"


class AnsweringWorker(Worker):
    def stats(self) -> str:
        return "all is well"


class Finished:
    def __init_subclass__(cls) -> None:
        raise TypeError("nobody extends this")


not_a_class = 3


def test_auto_is_the_worker_itself() -> None:
    assert worker_class(Worker, "auto", "") is Worker
    assert worker_class(Worker, "drumline.workers.Worker", "") is Worker


@pytest.mark.parametrize("named", [f"{HERE}.Mine", f"{HERE}:Mine"])
def test_a_class_is_named_by_module_and_name(named: str) -> None:
    assert worker_class(Worker, named, "") is Mine


def test_an_extension_is_mixed_into_the_worker_class() -> None:
    cls = worker_class(Worker, f"{HERE}.Mine", f"{HERE}.Extension")
    assert cls.__mro__[1:4] == (Extension, Mine, Worker)


@pytest.mark.parametrize(
    ("worker_cls", "extension", "field", "said"),
    [
        ("nowhere.Mine", "", "worker_cls", "ModuleNotFoundError: No module named 'nowhere'"),
        (f"{HERE}.Yours", "", "worker_cls", "has no class Yours"),
        (f"{HERE}.not_a_class", "", "worker_cls", "has no class not_a_class"),
        (f"{HERE}.Extension", "", "worker_cls", "which is no Worker"),
        (f"{HERE}.AnsweringWorker", "", "worker_cls", "which defines stats"),
        ("Mine", "", "worker_cls", "module.Class or module:Class"),
        ("", "", "worker_cls", "module.Class or module:Class"),
        (".relative.Mine", "", "worker_cls", "module.Class or module:Class"),
        ("__main__.Mine", "", "worker_cls", "the script of the app"),
        ("auto", "nowhere:Extension", "worker_extension_cls", "nowhere"),
        ("auto", f"{HERE}.Mine", "worker_extension_cls", "named by worker_cls"),
        ("auto", f"{HERE}.Clashing", "worker_extension_cls", "which defines _step, model_runner, run;"),
        ("auto", f"{HERE}.Answering", "worker_extension_cls", "which defines ping"),
        ("auto", f"{HERE}.Finished", "worker_extension_cls", "TypeError: nobody extends this"),
    ],
)
def test_what_cannot_be_a_rank_is_refused_with_its_field(
    worker_cls: str, extension: str, field: str, said: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        worker_class(Worker, worker_cls, extension)
    assert caught.value.info.field == field
    assert said in caught.value.text
    assert caught.value.info.valid


def test_a_module_that_fails_when_it_is_imported_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_at_import.py").write_text("raise RuntimeError('half done')")
    (tmp_path / "ends_at_import.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    for named, said in (("breaks_at_import.X", "RuntimeError: half done"), ("ends_at_import.X", "SystemExit: 3")):
        with pytest.raises(InvalidConfig, match=said):
            worker_class(Worker, named, "")


def test_importing_the_package_of_the_workers_loads_neither_torch_nor_numpy() -> None:
    program = "import sys, drumline.workers; sys.exit(' '.join({'torch', 'numpy'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
