"""Runs one function on several ranks that are threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from drumline.workers.layers import ModelGroups
from tests.parity.threadgroup import ThreadGroup, ThreadMember

T = TypeVar("T")
DEADLINE_S = 10.0


def on_ranks(size: int, function: Callable[[ThreadMember], T]) -> list[T]:
    """``function`` on ranks 0 to size - 1, each with its view of one group; what they returned. The first error of any
    rank is raised, and frees the others."""
    group = ThreadGroup(range(size))
    with ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        runs = [threads.submit(function, group.member(rank)) for rank in range(size)]
        done, late = wait(runs, DEADLINE_S, FIRST_EXCEPTION)
        failed = [run for run in done if run.exception() is not None]
        if failed or late:
            group.abort()
        for run in failed:
            run.result()
        return [run.result(0) for run in runs]


def model_groups(member: ThreadMember, *, attn_tp: ThreadMember | None = None) -> ModelGroups:
    """One group for heads, channels and experts; ``attn_tp`` where an attention replica has fewer ranks."""
    groups = ModelGroups()
    groups.tp = groups.experts = member
    groups.attn_tp = attn_tp or member
    return groups
