"""The demo model that ships in the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.parity.oracle import Oracle, relative_error
from tests.parity.stepdriver import StepDriver, Stream, loaded_runner, worker_config
from tests.parity.test_one_rank import TOLERANCE

DEMO = Path(__file__).parents[2] / "engine" / "demo"


@pytest.mark.parametrize("prompt", ["The with statement is used to", "def __init__(self, name):", "Return a list of"])
def test_demo_model_writes_what_transformers_writes(prompt: str) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    stream = Stream(tokenizer.encode(prompt).ids, 64)
    driver = StepDriver([[loaded_runner(worker_config(DEMO))]])
    driver.run([[stream]])
    driver.close()
    oracle = Oracle(DEMO)
    assert oracle.judge(stream.prompt, stream.generated).difference < 0
    expected = oracle.logits(stream.tokens)[len(stream.prompt) - 1 : -1]
    assert relative_error(torch.stack(stream.logits), expected) < TOLERANCE
