"""PAUSED(n) -> RUNNING(n) -> PAUSED(n + 1)."""

from __future__ import annotations

from drumline.engine.core.wave import Wave, WaveState
from tests.unit.core.driver import Driver


def state(wave: Wave) -> tuple[str, int]:
    return (wave.state.value, wave.number)


def test_a_wave_opens_with_its_first_step_and_closes_when_nothing_is_left() -> None:
    wave = Wave()
    assert state(wave) == ("paused", 0)
    assert wave.step() == 0
    assert wave.state is WaveState.RUNNING
    wave.settle(unfinished=1, in_flight=0)
    assert state(wave) == ("running", 0)
    wave.settle(unfinished=0, in_flight=1)
    assert state(wave) == ("running", 0)
    wave.settle(unfinished=0, in_flight=0)
    assert state(wave) == ("paused", 1)


def test_work_that_arrives_while_the_last_steps_are_in_flight_opens_the_next_wave_without_draining() -> None:
    wave = Wave()
    wave.step()
    wave.settle(unfinished=0, in_flight=1)
    wave.settle(unfinished=1, in_flight=1)
    assert wave.step() == 1
    assert state(wave) == ("running", 1)


def test_a_paused_wave_stays_paused_until_a_step() -> None:
    wave = Wave()
    wave.settle(unfinished=0, in_flight=0)
    wave.settle(unfinished=3, in_flight=0)
    assert state(wave) == ("paused", 0)


def test_an_engine_without_work_plans_nothing() -> None:
    driver = Driver(num_blocks=[4, 4])
    assert driver.plan() == []
    assert driver.core.idle


def test_idle_replicas_run_dummy_steps_while_the_group_is_unfinished_and_none_after() -> None:
    driver = Driver(num_blocks=[8, 8, 8])
    driver.accept("a", 4, max_tokens=3)
    for _ in range(3):
        steps = driver.plan()
        assert [len(step.num_tokens_across_dp) for step in steps] == [3, 3, 3]
        driver.answer([5], [], [])
    assert driver.plan() == []
    (group,) = driver.core.group_status()
    assert (group.wave, group.wave_state, group.step, group.dummy_steps) == (1, "paused", 2, 6)


def test_after_an_unforeseen_end_no_more_dummy_steps_run_than_were_in_flight() -> None:
    driver = Driver(num_blocks=[8, 8], async_scheduling=True)
    driver.accept("a", 4, max_tokens=30)
    driver.plan()
    driver.plan()
    driver.answer([2], [])
    assert driver.plan() == []
    assert driver.core.group_status()[0].wave_state == "running"
    driver.answer([9], [])
    assert driver.plan() == []
    assert (driver.core.group_status()[0].wave, driver.core.counters()["dummy_steps"]) == (1, 2)


def test_the_steps_of_the_next_wave_carry_its_number() -> None:
    driver = Driver()
    driver.accept("a", 4, max_tokens=1)
    assert driver.run([5]).wave == 0
    driver.accept("b", 4, max_tokens=1)
    assert driver.run([5]).wave == 1


def test_wave_numbers_survive_an_epoch_and_steps_start_anew() -> None:
    driver = Driver()
    driver.accept("a", 4, max_tokens=1)
    driver.run([5])
    driver.core.open_epoch(0, 2)
    driver.accept("b", 4, max_tokens=1)
    step = driver.plan()[0]
    assert (step.epoch, step.wave, step.step) == (2, 1, 0)
