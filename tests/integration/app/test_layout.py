"""A running engine says who holds what, as ``drumline layout`` does without one."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner

from drumline.engine import AsyncEngine
from drumline.engine.cli import main
from tests.integration.app.conftest import WITHIN_S

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_layout_of_a_running_engine(engine: AsyncEngine) -> None:
    async with asyncio.timeout(WITHIN_S):
        made = await engine.layout()
    asked = ["layout", "--model", "demo", "--max-model-len", "128", "--device", "cpu", "--json"]
    done = await asyncio.to_thread(CliRunner().invoke, main, asked)
    assert json.loads(made.to_json()) == json.loads(done.stdout)
