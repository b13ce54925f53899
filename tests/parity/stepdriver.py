"""Drives model runners with hand-made steps, as a coordinator would: chunks, evictions, re-admissions, shared blocks.

Several replicas make a lockstep group; their steps are planned together. Each replica may have several ranks (tensor
parallel, stages of a pipeline), which are all given the replica's step. Every rank runs in a thread of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from drumline.protocol.messages import (
    NO_FETCHES,
    NO_NUMBERS,
    Admit,
    I32Matrix,
    Step,
    WorkerConfig,
)
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps, initial_placement
from drumline.workers.epoch_groups import StepGroups
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.model_runner import ModelRunner, StepOutput
from tests.parity.rows import GREEDY, Replica, Stream, admission, int32

STEP_DEADLINE_S = 30.0

__all__ = ["GREEDY", "StepDriver", "Stream", "first_experts", "loaded_runner", "worker_config"]


def worker_config(folder: Path, **changes: Any) -> WorkerConfig:
    values: dict[str, Any] = {
        "model": str(folder),
        "dtype": "auto",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "block_size": 8,
        "num_blocks": 1024,
        "kv_cache_memory_bytes": 0,
        "gpu_memory_utilization": 0.9,
        "data_parallel_size": 1,
    }
    return WorkerConfig(**(values | changes))


def loaded_runner(config: WorkerConfig, rank: int = 0, *, groups: StepGroups | None = None) -> ModelRunner:
    """A runner with its weights and its cache, ready for the first step."""
    spec = ModelSpec.from_folder(config.model)
    layout = config.layout
    runner = ModelRunner(config, spec, torch.device("cpu"), layout, rank)
    placement, own = first_experts(config, spec, rank)
    runner.load(own)
    runner.init_kv_cache()
    everyone = EpochPlace.of(layout, range(layout.num_ranks), rank)
    runner.refit(everyone, placement, NO_NUMBERS, NO_FETCHES, None, lambda: None)
    if groups is not None:
        runner.meet(groups)
    return runner


def first_experts(config: WorkerConfig, spec: ModelSpec, rank: int) -> tuple[I32Matrix, I32Matrix]:
    """The placement that an engine starts with, and what ``rank`` loads of it."""
    layout, ep_size = config.layout, config.layout.ep_size if spec.is_moe else 1
    placement = initial_placement(len(spec.moe_layers), spec.num_experts, ep_size, config.expert_placement_strategy)
    if not layout.enable_expert_parallel:
        return placement, np.zeros((0, 0), dtype=np.int32)
    own = PlacementMaps.build(placement, spec.num_experts, ep_size).local_slots(layout.ep_rank(rank))
    return placement, placement[:, own.start : own.stop]


class StepDriver:
    """Runs streams to their end. ``evict_chance`` per step and replica; ``share_prefixes`` reuses computed blocks."""

    def __init__(
        self,
        replicas: Sequence[Sequence[ModelRunner]],
        *,
        seed: int = 0,
        evict_chance: float = 0.0,
        share_prefixes: bool = False,
        reporting: Sequence[int] = (),
    ) -> None:
        num_lanes = replicas[0][0].layout.pipeline_parallel_size
        places = reporting or [0] * len(replicas)
        self.replicas = [Replica(ranks, place, num_lanes) for ranks, place in zip(replicas, places, strict=True)]
        self.num_lanes = num_lanes
        self.random = random.Random(seed)
        self.evict_chance = evict_chance
        self.share_prefixes = share_prefixes
        self.step = 0
        names = ("chunks", "evictions", "cached_tokens", "mixed_steps", "dummy_steps", "restated_decodes")
        self.counts = dict.fromkeys(names, 0)

    def close(self) -> None:
        mock.patch.stopall()

    def run(self, streams_of_replicas: Sequence[Sequence[Stream]], steps: int | None = None) -> None:
        """Run ``streams_of_replicas[i]``, and what is left of earlier ones, on runner i until all are done.

        ``steps``: run so many instead, the last of them in vain: what it planned stands, and no result of it is known.
        """
        for replica, streams in zip(self.replicas, streams_of_replicas, strict=True):
            replica.waiting.extend(streams)
        # OpenMP counts threads by thread: more than one each would only fight over the cores.
        workers = sum(len(replica.ranks) for replica in self.replicas)
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            while any(replica.unfinished for replica in self.replicas) if steps is None else steps > 0:
                steps = None if steps is None else steps - 1
                self._run_step(threads, void=steps == 0)

    def restate(self, before: StepDriver, kept: dict[int, int]) -> None:
        """Go on with what ``before`` has left undone, in an epoch that begins. ``kept``: replicas of before whose cache
        is whole, to the replicas that they are now. The sequences of others start anew on the first."""
        for place, old in enumerate(before.replicas):
            if place in kept:
                new = self.replicas[kept[place]]
                new.rows = {row: stream for row, stream in old.rows.items() if not stream.done}
                new.lanes, new.waiting = old.lanes, old.waiting
                new.free, new.cached, new.restates = old.free, old.cached, True
                continue
            lost = [stream for stream in (*old.rows.values(), *old.waiting) if not stream.done]
            for stream in lost:
                stream.blocks, stream.computed, stream.decoding = [], 0, False
            self.replicas[0].waiting = [*self.replicas[0].waiting, *lost]

    def _run_step(self, threads: ThreadPoolExecutor, *, void: bool = False) -> None:
        lane = self.step % self.num_lanes
        plans = [self._plan(replica, lane) for replica in self.replicas]
        counts = np.array([sum(computes.values()) for _, computes in plans], dtype=np.int32)
        self.counts["dummy_steps"] += int((counts == 0).sum())
        self.step += 1
        runs = []
        for replica, (parts, _) in zip(self.replicas, plans, strict=True):
            step = Step(term=1, epoch=1, wave=1, step=self.step, num_tokens_across_dp=counts, lane=lane, **parts)
            runs.append([threads.submit(rank.execute, step) for rank in replica.ranks])
        # A rank that fails leaves the others waiting for it: its own error is the one worth seeing.
        everything = [run for of_replica in runs for run in of_replica]
        wait(everything, STEP_DEADLINE_S, FIRST_EXCEPTION)
        for run in everything:
            if run.done():
                run.result()
        if void:
            return
        for replica, (_, computes), of_replica in zip(self.replicas, plans, runs, strict=True):
            outputs = [run.result(STEP_DEADLINE_S) for run in of_replica]
            assert all(not len(out.tokens) for place, out in enumerate(outputs) if place != replica.reporting)
            self._apply(replica, computes, outputs[replica.reporting])

    def _plan(self, replica: Replica, lane: int) -> tuple[dict[str, Any], dict[int, int]]:
        """The changing parts of a step, and how many tokens each row computes in it."""
        restated = self._restate(replica)
        evicted = [] if restated else self._evict(replica)
        admitted = restated + self._admit(replica)
        budget = self.random.choice((16, 40, replica.runner.config.max_num_batched_tokens))
        rows = {row: stream for row, stream in replica.rows.items() if replica.lanes[row] == lane}
        computes = {row: 1 for row, stream in rows.items() if stream.decoding and not stream.done}
        prefills: dict[int, int] = {}
        for row, stream in rows.items():
            left = len(stream.tokens) - stream.computed
            room = budget - sum(computes.values())
            if not stream.decoding and room > 0:
                prefills[row] = computes[row] = min(left, room)
                self.counts["chunks"] += left > room
        # Rows that are done stay until they are evicted; they are told to wait.
        waits = {row: 0 for row, stream in rows.items() if stream.decoding and stream.done}
        self.counts["mixed_steps"] += 0 < len(prefills) < len(computes)
        appended = [pair for row, count in computes.items() for pair in self._append(replica, row, count)]
        named = prefills | waits
        parts = {
            "evicted": int32(evicted),
            "admitted": tuple(admitted),
            "append_rows": int32([row for row, _ in appended]),
            "append_blocks": int32([block for _, block in appended]),
            "prefill_rows": int32(list(named)),
            "prefill_counts": int32(list(named.values())),
        }
        return parts, computes

    def _evict(self, replica: Replica) -> list[int]:
        leaving = [row for row, stream in replica.rows.items() if stream.done]
        running = [row for row in replica.rows if row not in leaving]
        if running and self.random.random() < self.evict_chance:
            row = self.random.choice(running)
            leaving.append(row)
            self.counts["evictions"] += 1
            replica.waiting.append(replica.rows[row])
        for row in leaving:
            stream = replica.rows.pop(row)
            kept = set(replica.cached.values())
            replica.free.extend(block for block in stream.blocks if block not in kept)
            stream.blocks, stream.computed, stream.decoding = [], 0, False
        return leaving

    def _admit(self, replica: Replica) -> list[Admit]:
        admitted = []
        free_rows = [row for row in range(replica.runner.config.max_num_seqs) if row not in replica.rows]
        self.random.shuffle(free_rows)
        while replica.waiting and free_rows:
            stream, row = replica.waiting.pop(0), free_rows.pop()
            replica.rows[row] = stream
            replica.lanes[row] = lane = self.random.randrange(self.num_lanes)
            if self.share_prefixes:
                stream.blocks = self._cached_blocks(replica, stream.tokens)
            stream.computed = len(stream.blocks) * replica.runner.config.block_size
            self.counts["cached_tokens"] += stream.computed
            admitted.append(admission(row, stream, lane))
        return admitted

    def _restate(self, replica: Replica) -> list[Admit]:
        """All rows of a replica that kept its cache, in the first step of an epoch."""
        rows = replica.rows if replica.restates else {}
        replica.restates = False
        for stream in rows.values():
            self.counts["restated_decodes"] += stream.decoding
            stream.decoding = False
        return [admission(row, stream, replica.lanes[row]) for row, stream in rows.items()]

    def _cached_blocks(self, replica: Replica, tokens: list[int]) -> list[int]:
        size, blocks = replica.runner.config.block_size, []
        for end in range(size, len(tokens), size):
            block = replica.cached.get(tuple(tokens[:end]))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _append(self, replica: Replica, row: int, count: int) -> list[tuple[int, int]]:
        stream, size = replica.rows[row], replica.runner.config.block_size
        pairs = []
        while len(stream.blocks) * size < stream.computed + count:
            stream.blocks.append(replica.free.pop())
            pairs.append((row, stream.blocks[-1]))
        return pairs

    def _apply(self, replica: Replica, computes: dict[int, int], output: StepOutput) -> None:
        logprobs = dict(zip(output.logprob_index.tolist(), output.logprobs, strict=True))
        size, sampled = replica.runner.config.block_size, 0
        for row in sorted(computes):
            stream = replica.rows[row]
            stream.computed += computes[row]
            for end in range(size, stream.computed + 1, size):
                replica.cached.setdefault(tuple(stream.tokens[:end]), stream.blocks[end // size - 1])
            if stream.computed == len(stream.tokens):
                stream.generated.append(int(output.tokens[sampled]))
                stream.logits.append(replica.captured[-1][sampled])
                if sampled in logprobs:
                    stream.logprobs.append(logprobs[sampled])
                stream.decoding = True
                sampled += 1
        assert sampled == len(output.tokens)
        replica.captured.clear()
