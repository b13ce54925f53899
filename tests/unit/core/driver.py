"""A core driven by hand: one call per step, and tokens chosen by the test."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.outputs import ConnectionOutput
from drumline.protocol.messages import Accepted, Cancel, Rejected, SamplingSpec, Step, StepDone, Submit


class Driver:
    """``steps`` holds what was planned and not answered, oldest first, as one list of steps (by replica) each."""

    def __init__(self, num_blocks: Sequence[int] = (16,), epoch: bool = True, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "block_size": 4,
            "max_model_len": 64,
            "vocab_size": 1000,
            "eos_token_ids": (2,),
            "data_parallel_size": len(num_blocks),
            "lockstep": True,
            "async_scheduling": False,
        }
        self.config = CoreConfig(**{**defaults, **settings})
        self.core = EngineCore(self.config, num_blocks, term=1, seed=0)
        self.steps: deque[list[tuple[int, Step]]] = deque()
        self._calls = 0
        if epoch:
            for group in range(self.config.num_replicas // self.config.replicas_per_group):
                self.core.open_epoch(group, 1)

    def submit(
        self, request_id: str, prompt: int | Sequence[int], max_tokens: int = 8, connection: int = 1, **more: Any
    ) -> Accepted | Rejected:
        """``prompt``: token ids, or how many (then 100, 101, ...)."""
        self._calls += 1
        ids = range(100, 100 + prompt) if isinstance(prompt, int) else prompt
        spec = more.pop("sampling", SamplingSpec())
        msg = Submit(self._calls, request_id, np.asarray(ids, dtype=np.int32), spec, max_tokens, **more)
        return self.core.submit(connection, msg, 0.0)

    def accept(self, *args: Any, **more: Any) -> Accepted:
        answer = self.submit(*args, **more)
        assert isinstance(answer, Accepted), answer
        return answer

    def refuse(self, *args: Any, **more: Any) -> Rejected:
        answer = self.submit(*args, **more)
        assert isinstance(answer, Rejected), answer
        return answer

    def cancel(self, request_id: str, connection: int = 1) -> None:
        self.core.cancel(connection, Cancel(77, request_id), 0.0)

    def plan(self) -> list[Step]:
        """One more step, by replica; nothing if none is due."""
        planned = self.core.plan(0.0)
        if planned:
            self.steps.append(planned)
        return [step for _, step in planned]

    def answer(self, *tokens: Sequence[int]) -> list[ConnectionOutput]:
        """Answers the oldest step, with the tokens of each replica; hashes what was filled."""
        planned = self.steps.popleft()
        for (replica, step), own in zip(planned, tokens, strict=True):
            self.core.apply(replica, self.done(replica, step, own), 0.0)
        self.core.maintain(0.0)
        return self.core.outputs()

    def done(self, replica: int, step: Step, tokens: Sequence[int]) -> StepDone:
        return StepDone(step.term, step.epoch, replica, step.step, np.asarray(tokens, dtype=np.int32), _NONE)

    def run(self, *tokens: Sequence[int]) -> Step:
        """Plans and answers one step; returns the first replica's."""
        step = self.plan()[0]
        self.answer(*tokens)
        return step


_NONE = np.zeros(0, dtype=np.int32)


def prefills(step: Step) -> dict[int, int]:
    """Row to number of tokens."""
    return dict(zip(step.prefill_rows.tolist(), step.prefill_counts.tolist(), strict=True))


def appended(step: Step) -> list[tuple[int, int]]:
    """(row, block) in order."""
    return list(zip(step.append_rows.tolist(), step.append_blocks.tolist(), strict=True))


def tokens_of(outputs: list[ConnectionOutput]) -> list[tuple[int, int, int]]:
    """(handle, position, token) of all connections."""
    return [
        entry
        for output in outputs
        for entry in zip(output.handles.tolist(), output.positions.tolist(), output.tokens.tolist(), strict=True)
    ]


def ends_of(outputs: list[ConnectionOutput]) -> list[tuple[str, int, str, int, int]]:
    """(request id, index, reason, stop token, number of tokens)."""
    return [
        (end.request_id, end.index, end.reason, end.stop_token, end.num_tokens)
        for output in outputs
        for end in output.ends
    ]
