"""What of its host a rank computes on: how many threads, which device."""

from __future__ import annotations

import os

import torch

from drumline.protocol.messages import WorkerConfig

SMALL_MODEL_BYTES = 64 << 20


def choose_threads(config: WorkerConfig, weight_bytes: int) -> int:
    """How many threads compute: what the config says, else OMP_NUM_THREADS, else this rank's share of the cores.

    One for a model below ``SMALL_MODEL_BYTES``, whose products are over before another thread is awake: the demo model
    wrote 1,263 tokens/s in 8 streams on one thread of two idle cores, and 475 on two.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    said = config.num_threads or (int(asked) if asked.isdecimal() else 0)
    if said:
        return said
    if weight_bytes < SMALL_MODEL_BYTES:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // max(1, config.local_ranks))


def choose_device(config: WorkerConfig, rank: int) -> torch.device:
    """CUDA where it is there: the host's first rank takes device ``first_local_device``, the next ones those that
    follow, in turn; else the CPU."""
    if torch.cuda.is_available():
        number = config.first_local_device + rank - config.first_local_rank
        return torch.device("cuda", number % torch.cuda.device_count())
    return torch.device("cpu")
