import pytest
import torch

from tests.checkpoints import checkpoints

__all__ = ["checkpoints"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Products of models this small only get slower when threads share them."""
    torch.set_num_threads(1)
