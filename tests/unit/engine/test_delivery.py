"""What goes to clients leaves in the order it was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from drumline.engine.delivery import Delivery
from drumline.engine.journal import Batch, Journal
from tests.unit.engine.journal.told import Told, submit


class HeldJournal:
    """Commits when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.superseded = False

    def append(self, batch: Batch, on_committed: Callable[[], None]) -> None:
        assert not batch.empty
        self.waiting.append(on_committed)

    def commit(self) -> None:
        self.waiting.pop(0)()


def delivery_of(journal: HeldJournal) -> Delivery:
    return Delivery(cast(Journal, journal))


def fail() -> None:
    raise ZeroDivisionError


def batch() -> Batch:
    return Told().accept(submit("r1"))


def test_without_a_journal_everything_is_sent_at_once() -> None:
    sent: list[int] = []
    delivery = Delivery(None)
    delivery.push(batch(), lambda: sent.append(1))
    delivery.push(None, lambda: sent.append(2))
    assert sent == [1, 2]
    assert delivery.counters()["batches_queued"] == 0


def test_nothing_to_keep_and_nothing_before_it_is_sent_at_once() -> None:
    sent: list[int] = []
    delivery = delivery_of(HeldJournal())
    delivery.push(None, lambda: sent.append(1))
    delivery.push(Batch(), lambda: sent.append(2))
    assert sent == [1, 2]


def test_nothing_overtakes_what_waits() -> None:
    sent: list[int] = []
    journal = HeldJournal()
    delivery = delivery_of(journal)
    delivery.push(batch(), lambda: sent.append(1))
    delivery.push(None, lambda: sent.append(2))
    delivery.push(batch(), lambda: sent.append(3))
    delivery.push(Batch(), lambda: sent.append(4))
    assert sent == []
    journal.commit()
    assert sent == [1, 2]
    journal.commit()
    assert sent == [1, 2, 3, 4]
    counters = delivery.counters()
    assert (counters["batches_queued"], counters["batches_committed"]) == (2, 2)
    assert counters["commit_us_max"] >= counters["commit_us_mean"] >= 0


def test_a_send_that_fails_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[int] = []
    journal = HeldJournal()
    delivery = delivery_of(journal)
    delivery.push(batch(), fail)
    delivery.push(None, lambda: sent.append(2))
    journal.commit()
    assert sent == [2]
    assert "ZeroDivisionError" in caplog.text


def test_a_send_that_pushes_comes_after_what_was_there() -> None:
    sent: list[int] = []
    journal = HeldJournal()
    delivery = delivery_of(journal)

    def first() -> None:
        sent.append(1)
        delivery.push(None, lambda: sent.append(3))

    delivery.push(batch(), first)
    delivery.push(None, lambda: sent.append(2))
    journal.commit()
    assert sent == [1, 2, 3]


def test_at_the_end_nothing_waits_any_more() -> None:
    sent: list[int] = []
    delivery = delivery_of(HeldJournal())
    delivery.push(batch(), lambda: sent.append(1))
    delivery.push(None, lambda: sent.append(2))
    delivery.close()
    assert sent == [1, 2]


def test_once_another_coordinator_has_the_journal_nothing_is_sent() -> None:
    journal = HeldJournal()
    delivery = delivery_of(journal)
    delivery.push(batch(), lambda: pytest.fail("sent"))
    journal.superseded = True
    delivery.push(None, lambda: pytest.fail("sent"))
    delivery.close()
    assert delivery.counters()["batches_committed"] == 0
