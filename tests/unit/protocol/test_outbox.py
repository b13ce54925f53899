from __future__ import annotations

from drumline.protocol.outbox import MAX_UNREAD, Lane


def lane_of(count: int) -> Lane:
    """Numbers from 1 on, written a second apart from 100 on."""
    lane = Lane()
    for seq in range(1, count + 1):
        lane.add(seq, f"key {seq}", 99.0 + seq)
    return lane


def test_what_was_read_is_dropped_oldest_first() -> None:
    lane = lane_of(5)
    assert lane.drop_to(3) == ["key 1", "key 2", "key 3"]
    assert lane.drop_to(3) == []
    assert [entry.seq for entry in lane.left] == [4, 5]
    assert lane.drop_to(9) == ["key 4", "key 5"]
    assert lane.last == 5


def test_a_lane_is_full_at_its_bound() -> None:
    assert not lane_of(MAX_UNREAD - 1).full
    lane = lane_of(MAX_UNREAD)
    assert lane.full
    lane.drop_to(1)
    assert not lane.full


def test_what_is_old_is_told_and_stays() -> None:
    lane = lane_of(4)
    assert [entry.seq for entry in lane.written_before(102.0)] == [1, 2]
    assert lane.written_before(100.0) == []
    assert len(lane.left) == 4
