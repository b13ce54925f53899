"""What a step says of itself, against what the table makes of it."""

from __future__ import annotations

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Step
from drumline.workers.batch import StepRows


def checked_counts(
    step: Step, plan: StepRows, replica: int, num_replicas: int, num_stages: int, max_tokens: int
) -> list[int]:
    """The token counts of all replicas of the epoch, once they agree with the table of this ``replica``.

    Raises ProtocolError, before any rank is waited for.
    """
    counts: list[int] = step.num_tokens_across_dp.tolist()
    if len(counts) != num_replicas or min(counts) < 0:
        raise ProtocolError(
            f"step {step.step} has token counts {counts} for {num_replicas} replicas, of which this is {replica}"
        )
    if not 0 <= step.lane < num_stages:
        raise ProtocolError(f"step {step.step} is of lane {step.lane}; valid: 0 to {num_stages - 1}")
    if counts[replica] != plan.num_tokens:
        raise ProtocolError(
            f"step {step.step} says {counts[replica]} tokens for replica {replica}, its rows make {plan.num_tokens}"
        )
    if plan.num_tokens > max_tokens:
        raise ProtocolError(f"step {step.step} has {plan.num_tokens} tokens; valid: 0 to {max_tokens}")
    return counts
