"""When a client gives up a coordinator, and when it gives up waiting for the next; without a clock."""

from drumline.engine.presence import Presence, Timing, Verdict

TIMING = Timing(tick_s=1.0, probe_s=4.0, silence_s=15.0, start_silence_s=150.0, lease_s=60.0)


def verdicts(presence: Presence, start: int, end: int, *, up: bool, starting: bool = False) -> dict[Verdict, int]:
    """By verdict the first second in which it was given."""
    first: dict[Verdict, int] = {}
    for second in range(start, end):
        first.setdefault(presence.judge(float(second), up=up, starting=starting), second)
    return first


def test_a_silent_coordinator_is_probed_and_then_given_up() -> None:
    first = verdicts(Presence(TIMING), 0, 30, up=True)
    assert first == {Verdict.NOTHING: 0, Verdict.PROBE: 4, Verdict.DROP: 16}


def test_one_that_is_heard_is_neither() -> None:
    presence = Presence(TIMING)
    for second in range(100):
        presence.heard()
        assert presence.judge(float(second), up=True, starting=False) is Verdict.NOTHING


def test_time_in_which_the_loop_did_not_run_hardly_counts() -> None:
    presence = Presence(TIMING)
    presence.judge(0.0, up=True, starting=False)
    assert presence.judge(1000.0, up=True, starting=False) is Verdict.NOTHING
    assert presence.silent_s == 2.0


def test_without_a_coordinator_the_lease_counts_and_with_one_that_starts_the_time_of_a_start() -> None:
    presence = Presence(TIMING)
    assert presence.lost(0.0)
    assert not presence.lost(1.0)
    assert verdicts(presence, 0, 100, up=False) == {Verdict.NOTHING: 0, Verdict.END: 61}
    first = verdicts(Presence(TIMING), 0, 200, up=False, starting=True)
    assert first[Verdict.END] == 151
    assert first[Verdict.PROBE] == 4


def test_outages_add_up() -> None:
    presence = Presence(TIMING)
    assert presence.outages_s(5.0) == 0.0
    presence.lost(10.0)
    assert presence.outages_s(12.0) == 2.0
    assert presence.back(13.0) == 3.0
    assert presence.back(14.0) == 0.0
    presence.lost(20.0)
    assert presence.outages_s(21.0) == 4.0
