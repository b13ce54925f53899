"""Torch's default process group, which nothing of ours may ask for."""

from __future__ import annotations

from torch import distributed

WAYS = ("init_process_group", "new_group", "_get_default_group", "_get_default_store", "_get_group_size")


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("torch's default process group was asked for")


def shut() -> None:
    """From now on every way to the default group raises AssertionError in this process."""
    world = distributed.distributed_c10d
    for name in WAYS:
        assert hasattr(world, name)
        setattr(world, name, _refuse)
        if hasattr(distributed, name):
            setattr(distributed, name, _refuse)


def is_shut() -> bool:
    """Whether :func:`shut` was called, and there is no default group either."""
    world = distributed.distributed_c10d
    return all(getattr(world, name) is _refuse for name in WAYS) and not distributed.is_initialized()
