"""What can be said of NCCL's operations without a GPU: how their ends are told apart, and how a group is made."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from torch import distributed

from drumline.workers.groups import forming
from drumline.workers.groups.nccl_ops import poll_slice
from drumline.workers.groups.place import GroupPlace
from drumline.workers.groups.watch import SLICE_S

BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


class Work:
    """An operation that has ended, perhaps badly, or has not."""

    def __init__(self, *, completed: bool, error: str = "") -> None:
        self.completed, self.error, self.waits = completed, error, 0

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        self.waits += 1
        if self.error:
            raise RuntimeError(self.error)


def test_an_operation_that_has_ended_is_done_or_says_why_not() -> None:
    done, failed = Work(completed=True), Work(completed=True, error="NCCL error: remote process exited")
    assert poll_slice(done) is None
    assert poll_slice(failed) == "NCCL error: remote process exited"
    # The wait orders the streams: without it the next kernel may read what is not there yet.
    assert (done.waits, failed.waits) == (1, 1)


def test_an_operation_that_goes_on_is_left_after_a_slice_and_never_waited_for() -> None:
    work, began = Work(completed=False), time.monotonic()
    assert poll_slice(work) == ""
    assert SLICE_S <= time.monotonic() - began < SLICE_S + 1.0
    assert work.waits == 0


def test_who_only_looks_is_not_kept_waiting() -> None:
    work, done, began = Work(completed=False), Work(completed=True), time.monotonic()
    assert poll_slice(work, 0.0) == ""
    assert poll_slice(done, 0.0) is None
    assert time.monotonic() - began < SLICE_S
    assert (work.waits, done.waits) == (0, 1)


def test_a_group_is_made_so_that_waits_raise_and_no_watchdog_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str | None, int, int]] = []

    class Group:
        class Options:
            pass

        def __init__(self, store: object, position: int, size: int, options: Any) -> None:
            assert options._timeout.total_seconds() > 5.0
            made.append((os.environ.get(BLOCKING_WAIT), position, size))

        def eager_connect_single_device(self, device: torch.device) -> None:
            assert device == torch.device("cuda", 1)

    monkeypatch.delenv(BLOCKING_WAIT, raising=False)
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    place = GroupPlace(1, 1, 7, (5, 7), "127.0.0.1", 1, torch.device("cuda", 1))
    prefix = distributed.PrefixStore("test", distributed.HashStore())  # type: ignore[attr-defined]
    forming._connect_nccl(prefix, place, 5.0)
    assert made == [("1", 1, 2)]
