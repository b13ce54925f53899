"""The order of those that wait."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.request import Place, Request, Sequence
from drumline.engine.core.waiting import WaitingQueue
from drumline.protocol.messages import SamplingSpec, Submit


def sequence(arrival: int, priority: int = 0) -> Sequence:
    prompt = np.asarray([1], dtype=np.int32)
    submit = Submit(1, f"r{arrival}", prompt, SamplingSpec(), max_tokens=8, priority=priority)
    request = Request(submit, 1, submit.sampling, prompt, group=0)
    return Sequence(request, 0, stream=1, arrival=arrival, replica=0, tokens=prompt, max_length=9)


def test_lowest_priority_number_first_then_earliest_arrival() -> None:
    queue = WaitingQueue()
    for one in (sequence(1), sequence(2, priority=-1), sequence(0), sequence(3, priority=4)):
        queue.push(one)
    assert [queue.pop().arrival for _ in range(4)] == [2, 0, 1, 3]
    assert queue.head() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_a_sequence_that_ends_while_it_waits_is_passed_over() -> None:
    queue = WaitingQueue()
    first, second = sequence(0), sequence(1)
    queue.push(first)
    queue.push(second)
    first.place = Place.ENDED
    queue.discard()
    assert (len(queue), queue.head()) == (1, second)


def test_cancelled_sequences_do_not_pile_up_behind_one_that_waits() -> None:
    queue = WaitingQueue()
    queue.push(sequence(0))
    for arrival in range(1, 10_000):
        one = sequence(arrival)
        queue.push(one)
        one.place = Place.ENDED
        queue.discard()
    assert len(queue) == 1
    assert len(queue._heap) < 100
