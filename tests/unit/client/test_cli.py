"""The ``drumline`` command around its subcommands."""

from __future__ import annotations

import importlib
from typing import NoReturn

import pytest
from click.testing import CliRunner

from drumline.engine.cli import main


def test_ctrl_c_while_a_command_is_imported_has_the_status_of_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    done = CliRunner().invoke(main, ["generate", "--prompt", "x"])
    assert (done.exit_code, done.output) == (130, "")
