"""The facade: submission, answers, connections, resume, epochs, failure."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.engine_core import EngineCore
from drumline.protocol.errors import InvalidConfig, ProtocolError
from drumline.protocol.messages import LogprobEntry, Rejected, Resume, Resumed, SamplingSpec, StepDone
from tests.unit.core.driver import Driver, ends_of, tokens_of

# ------------------------------------------------------------------------------------------------------------- submit


@pytest.mark.parametrize(
    ("more", "field", "found", "valid"),
    [
        ({"prompt": 0}, "prompt", "shape (0,)", "at least one token id"),
        ({"prompt": 64}, "prompt", "64 tokens", "at most 63 tokens (max_model_len 64"),
        ({"prompt": 41}, "prompt", "41 tokens", "at most 40 tokens (10 KV blocks of 4)"),
        ({"prompt": [5, 1000]}, "prompt", "token id 1000 at 1", "0 to 999"),
        ({"prompt": [5, -1]}, "prompt", "token id -1 at 1", "0 to 999"),
        ({"max_tokens": -3}, "max_tokens", "-3", "1 to"),
        ({"n": 0}, "n", "0", "1 to"),
        ({"data_parallel_rank": 1}, "data_parallel_rank", "1", "-1 to 0"),
        ({"priority": 1 << 40}, "priority", str(1 << 40), "to 2147483647"),
        ({"sampling": SamplingSpec(temperature=-1.0)}, "temperature", "-1.0", "at least 0"),
        ({"sampling": SamplingSpec(temperature=float("nan"))}, "temperature", "nan", "at least 0"),
        ({"sampling": SamplingSpec(top_p=0.0)}, "top_p", "0.0", "above 0, at most 1"),
        ({"sampling": SamplingSpec(min_tokens=9)}, "min_tokens", "9", "at most max_tokens (8)"),
        ({"sampling": SamplingSpec(stop_token_ids=(1000,))}, "stop_token_ids", "1000", "0 to 999"),
        ({"sampling": SamplingSpec(logprobs=21)}, "logprobs", "21", "-1 to 20"),
        ({"sampling": SamplingSpec(seed=1 << 63)}, "seed", str(1 << 63), f"to {(1 << 63) - 1}"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_figures(
    more: dict[str, object], field: str, found: str, valid: str
) -> None:
    driver = Driver(num_blocks=[10])
    error = driver.refuse("a", **{"prompt": 4, **more}).error
    assert (error.kind, error.field) == ("invalid_request", field)
    assert found in error.found
    assert valid in error.valid
    assert driver.core.idle


def test_a_live_id_is_refused_until_its_end_is_acknowledged() -> None:
    driver = Driver()
    driver.accept("a", 4, max_tokens=1)
    assert driver.refuse("a", 4).error.kind == "duplicate_request"
    driver.run([5])
    driver.core.forget("a")
    driver.accept("a", 4)
    driver.core.forget("a")  # it runs: its id stays taken
    assert driver.refuse("a", 4).error.kind == "duplicate_request"


def test_a_full_queue_says_so_and_may_be_tried_again() -> None:
    driver = Driver(max_waiting=3)
    driver.accept("a", 4, n=2)
    error = driver.refuse("b", 4, n=2).error
    assert (error.kind, error.retryable) == ("queue_full", True)
    assert "2 sequences wait and 2 more" in error.text
    driver.accept("c", 4)


def test_a_seed_is_drawn_only_when_none_is_given() -> None:
    driver = Driver()
    given = driver.accept("a", 4, sampling=SamplingSpec(seed=-7), seed_given=True)
    drawn = driver.accept("b", 4), driver.accept("c", 4)
    assert given.seed == -7
    assert len({given.seed, drawn[0].seed, drawn[1].seed}) == 3
    seeds = [admit.sampling.seed for admit in driver.plan()[0].admitted]
    assert seeds == [given.seed, drawn[0].seed, drawn[1].seed]


def test_drawn_seeds_are_the_same_for_the_same_engine_seed_and_term() -> None:
    assert Driver().accept("a", 4).seed == Driver().accept("a", 4).seed


def test_nothing_is_planned_before_an_epoch_is_open() -> None:
    driver = Driver(epoch=False)
    driver.accept("a", 4)
    assert driver.plan() == []
    driver.core.open_epoch(0, 1)
    assert len(driver.plan()) == 1


def test_replicas_without_blocks_are_refused() -> None:
    config = CoreConfig(max_num_seqs=1, max_num_batched_tokens=1, block_size=4, max_model_len=8, vocab_size=10)
    with pytest.raises(InvalidConfig, match="num_blocks"):
        EngineCore(config, [0], term=1, seed=0)
    with pytest.raises(InvalidConfig, match="num_blocks"):
        EngineCore(config, [4, 4], term=1, seed=0)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"eos_token_ids": (1000,)}, "eos_token_ids"),
        ({"max_model_len": 1}, "max_model_len"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(more: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Driver(**more)  # type: ignore[arg-type]
    assert caught.value.field == field


# ------------------------------------------------------------------------------------------------------------ answers


def answer(driver: Driver, **changes: object) -> StepDone:
    (_, step), *_ = driver.steps[0]
    return msgspec.structs.replace(driver.done(0, step, [5]), **changes)


NO_I32 = np.zeros(0, dtype=np.int32)
ENTRY = LogprobEntry(5, -1.0, 1, NO_I32, np.zeros(0, dtype=np.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {"term": 0},
        {"epoch": 0},
        {"step": 1},
        {"step": -1},
        {"tokens": NO_I32},
        {"tokens": np.asarray([5, 6], dtype=np.int32)},
        {"tokens": np.asarray([1000], dtype=np.int32)},
        {"tokens": np.asarray([-1], dtype=np.int32)},
        {"logprob_index": np.asarray([1], dtype=np.int32), "logprobs": (ENTRY,)},
        {"logprob_index": NO_I32, "logprobs": (ENTRY,)},
        {"logprob_index": np.asarray([0], dtype=np.int32)},
    ],
)
def test_an_answer_that_does_not_fit_is_refused_and_changes_nothing(changes: dict[str, object]) -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.plan()
    with pytest.raises(ProtocolError) as caught:
        driver.core.apply(0, answer(driver, **changes), 0.0)
    assert caught.value.rank == 0
    assert driver.core.outputs() == []
    assert tokens_of(driver.answer([5])) == [(1, 0, 5)]


def test_an_answer_counts_once() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.plan()
    done = answer(driver)
    driver.core.apply(0, done, 0.0)
    with pytest.raises(ProtocolError):
        driver.core.apply(0, done, 0.0)
    assert tokens_of(driver.core.outputs()) == [(1, 0, 5)]


def test_replicas_may_answer_in_any_order_and_one_may_be_a_step_ahead() -> None:
    driver = Driver(num_blocks=[8, 8], async_scheduling=True)
    driver.accept("a", 4, data_parallel_rank=0)
    driver.accept("b", 4, data_parallel_rank=1)
    first, second = driver.plan(), driver.plan()
    for step, token in ((first[1], 5), (second[1], 6)):
        driver.core.apply(1, driver.done(1, step, [token]), 0.0)
    assert tokens_of(driver.core.outputs()) == [(2, 0, 5), (2, 1, 6)]
    assert driver.plan() == []  # replica 0 has not answered the first step
    driver.core.apply(0, driver.done(0, first[0], [7]), 0.0)
    assert len(driver.plan()) == 2
    assert tokens_of(driver.core.outputs()) == [(1, 0, 7)]


# --------------------------------------------------------------------------------------------------------- connections


def test_each_connection_is_told_its_own_tokens_and_ends() -> None:
    driver = Driver()
    driver.accept("a", 4, connection=7)
    driver.accept("b", 4, connection=3)
    driver.accept("c", 4, connection=7)
    driver.plan()
    outputs = driver.answer([5, 2, 6])
    assert [output.connection for output in outputs] == [3, 7]
    assert [tokens_of([output]) for output in outputs] == [[(2, 0, 2)], [(1, 0, 5), (3, 0, 6)]]
    assert ends_of(outputs) == [("b", 0, "stop", 2, 1)]


def test_a_dropped_connection_is_told_nothing_and_its_requests_are_gone() -> None:
    driver = Driver()
    driver.accept("a", 4, connection=1)
    driver.accept("b", 4, connection=2)
    driver.plan()
    driver.core.drop_connection(1, 0.0)
    assert [output.connection for output in driver.answer([5, 6])] == [2]
    assert driver.core.request_counts().cancelled == 1
    driver.accept("a", 4, connection=3)


def test_resume_says_everything_so_far_and_delivers_to_the_new_connection() -> None:
    driver = Driver()
    driver.accept("a", 4, connection=1)
    driver.run([5])
    driver.run([6])
    answer = driver.core.resume(2, Resume(9, "a", (1,)))
    assert isinstance(answer, Resumed)
    assert (answer.prompt.tolist(), [own.tolist() for own in answer.tokens]) == ([100, 101, 102, 103], [[5, 6]])
    assert answer.handles.tolist() == [2]
    driver.plan()
    (output,) = driver.answer([7])
    assert (output.connection, tokens_of([output])) == (2, [(2, 2, 7)])


def test_resume_of_an_ended_request_tells_its_end_until_it_is_forgotten() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.plan()
    driver.answer([2])
    answer = driver.core.resume(1, Resume(9, "a", (0,)))
    assert isinstance(answer, Resumed)
    assert [(end.reason, end.num_tokens, end.handle) for end in answer.ends] == [("stop", 1, 1)]
    driver.core.forget("a")
    gone = driver.core.resume(1, Resume(9, "a", (0,)))
    assert isinstance(gone, Rejected)
    assert gone.error.field == "request_id"


@pytest.mark.parametrize("positions", [(0, 0), (2,), (-1,)])
def test_resume_from_positions_that_do_not_exist_is_refused(positions: tuple[int, ...]) -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.run([5])
    answer = driver.core.resume(1, Resume(9, "a", positions))
    assert isinstance(answer, Rejected)
    assert answer.error.field == "positions"


# --------------------------------------------------------------------------------------------------- epochs and failure


def test_a_new_epoch_recomputes_every_sequence_from_its_last_acknowledged_token() -> None:
    driver = Driver(async_scheduling=True)
    driver.accept("a", 8)
    driver.plan()
    lost = driver.plan()[0]
    driver.answer([5])
    driver.core.open_epoch(0, 2)
    with pytest.raises(ProtocolError):
        driver.core.apply(0, driver.done(0, lost, [6]), 0.0)
    driver.steps.clear()
    step = driver.plan()[0]
    (admit,) = step.admitted
    assert (step.epoch, step.step, step.evicted.tolist()) == (2, 0, [])
    assert (admit.tokens.tolist(), admit.num_cached) == ([*range(100, 108), 5], 0)
    assert tokens_of(driver.answer([6])) == [(1, 1, 6)]


def test_an_epoch_that_is_not_newer_is_refused() -> None:
    driver = Driver()
    with pytest.raises(ValueError, match="epoch 1 after epoch 1"):
        driver.core.open_epoch(0, 1)


def test_failing_names_every_request_that_had_not_ended_and_leaves_nothing_to_do() -> None:
    driver = Driver()
    driver.accept("ended", 4, max_tokens=1)
    driver.run([5])
    driver.accept("running", 4, connection=2)
    driver.run([5])
    driver.plan()
    driver.accept("waiting", 4, connection=3)
    failed = driver.core.fail_all()
    assert failed == [(2, "running"), (3, "waiting")]
    assert driver.plan() == []
    counts = driver.core.request_counts()
    assert (counts.accepted, counts.finished, counts.failed) == (3, 1, 2)


def test_status_counts_rows_queues_and_blocks() -> None:
    driver = Driver(num_blocks=[8], max_num_seqs=1)
    driver.accept("a", 8, max_tokens=9)
    driver.accept("b", 8, max_tokens=9)
    driver.run([5])
    (replica,) = driver.core.replica_status()
    assert (replica.running, replica.waiting, replica.blocks_total, replica.blocks_free) == (1, 1, 8, 6)
    driver.cancel("a")
    (replica,) = driver.core.replica_status()
    assert (replica.running, replica.blocks_free, replica.blocks_cached) == (0, 8, 2)
