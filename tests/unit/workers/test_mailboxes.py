"""The rules of shared memory, with the ranks of a group in one process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drumline.protocol.errors import ProtocolError
from drumline.workers.abort import AbortFlag, EpochAborted
from drumline.workers.groups.mailboxes import OUTBOX_SLOT_BYTES, OUTBOX_SLOTS, Mailbox, Mailboxes, mailbox_bytes
from drumline.workers.groups.outboxes import Outboxes
from drumline.workers.groups.place import GroupPlace
from drumline.workers.groups.watch import GroupTimeout, PeerLost, Watch
from drumline.workers.progress import Progress

SIZE = 3
MEMBERS = (4, 5, 6)


class Ranks:
    """The same three mailboxes as each of three ranks sees them. Waits end after a tenth of a second."""

    def __init__(self) -> None:
        self.abort = AbortFlag()
        descriptors = [os.memfd_create("test-mailbox") for _ in MEMBERS]
        self.watches, self.mailboxes = [], []
        for fd in descriptors:
            os.ftruncate(fd, mailbox_bytes(SIZE))
        for position, rank in enumerate(MEMBERS):
            place = GroupPlace(1, 1, rank, MEMBERS, "127.0.0.1", 1, torch.device("cpu"))
            watch = Watch("test", place, self.abort, Progress(), 0.1)
            boxes = [Mailbox(fd, SIZE, os.getpid()) for fd in descriptors]
            self.watches.append(watch)
            self.mailboxes.append(Mailboxes(position, boxes, watch))
        for fd in descriptors:
            os.close(fd)
        self.outboxes = [Outboxes(boxes, watch) for boxes, watch in zip(self.mailboxes, self.watches, strict=True)]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    for outboxes in ranks.outboxes:
        outboxes.close()


def open_messages() -> int:
    """How many descriptors of this process are memory of large messages."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own, and what another thread closes
            count += "drumline-message" in str(entry.readlink())
    return count


def write(boxes: Mailboxes, value: float) -> int:
    operation = boxes.begin()
    boxes.half(boxes.position, operation, torch.float32)[:4] = value
    boxes.publish(operation)
    return operation


def test_a_half_is_written_again_only_when_all_have_begun_the_operation_after_it(ranks: Ranks) -> None:
    writer, quick, slow = ranks.mailboxes
    first = write(writer, 1.0)
    assert slow.join() == first  # it has begun the first operation, and reads late
    quick.join()
    write(writer, 2.0)
    quick.join()
    with pytest.raises(GroupTimeout, match="waited for rank 6: "):
        writer.begin()
    assert slow.half(0, first, torch.float32)[:4].tolist() == [1.0] * 4


def test_a_writer_does_not_wait_for_readers_that_keep_up(ranks: Ranks) -> None:
    writer, *readers = ranks.mailboxes
    for value in range(10):
        operation = write(writer, value)
        for reader in readers:
            assert reader.join() == operation
            reader.wait_for(0, operation)
            assert reader.half(0, operation, torch.float32)[:4].tolist() == [value] * 4


def test_what_a_rank_published_before_it_left_still_counts(ranks: Ranks) -> None:
    writer, reader, _ = ranks.mailboxes
    operation = write(writer, 7.0)
    writer.leave()
    reader.wait_for(0, operation)
    with pytest.raises(PeerLost, match="waited for rank 4: it has left the epoch"):
        reader.wait_for(0, operation + 1)


def test_a_wait_ends_when_the_epoch_does(ranks: Ranks) -> None:
    ranks.abort.abort_before(1, 2, "over")
    with pytest.raises(EpochAborted, match="over"):
        ranks.mailboxes[0].wait_for(1, 1)


def test_an_error_names_group_rank_collective_step_and_who_is_missing(ranks: Ranks) -> None:
    boxes, watch = ranks.mailboxes[1], ranks.watches[1]
    with watch, pytest.raises(GroupTimeout) as caught:
        boxes.wait_for_all(boxes.join(), 0.03)
    assert caught.value.text == (
        "group test, rank 5 (position 1 of 3), collective 1 of step -1: waited for ranks 4, 6: nothing within 0.03 s"
    )
    assert watch.failed


def test_a_message_waits_while_the_receiver_leaves_every_slot_unread(ranks: Ranks) -> None:
    sender, receiver, _ = ranks.outboxes
    for number in range(OUTBOX_SLOTS):
        sender.isend(torch.tensor([number], dtype=torch.uint8), 1).wait()
    with pytest.raises(GroupTimeout, match="waited for rank 5"):
        sender.isend(torch.tensor([255], dtype=torch.uint8), 1)
    for number in range(OUTBOX_SLOTS):
        data = torch.zeros(1, dtype=torch.uint8)
        receiver.irecv(data, 0).wait()
        assert data.tolist() == [number]
    sender.isend(torch.tensor([255], dtype=torch.uint8), 1).wait()


def test_a_tensor_may_be_written_to_once_its_message_is_sent(ranks: Ranks) -> None:
    sender, receiver, _ = ranks.outboxes
    for length in (5, OUTBOX_SLOT_BYTES + 5):
        data, found = torch.ones(length, dtype=torch.uint8), torch.zeros(length, dtype=torch.uint8)
        sender.isend(data, 1).wait()
        data.zero_()
        receiver.irecv(found, 0).wait()
        assert found.min() == 1


def test_large_messages_use_memory_again_that_has_been_read(ranks: Ranks) -> None:
    # What an earlier test has closed is dropped on a thread of its own.
    end = time.monotonic() + 5.0
    while open_messages() and time.monotonic() < end:
        time.sleep(0.01)
    sender, receiver, _ = ranks.outboxes
    for number in range(20):
        length = OUTBOX_SLOT_BYTES + 1 + number
        sender.isend(torch.full((length,), number, dtype=torch.uint8), 1)
        found = torch.empty(length, dtype=torch.uint8)
        receiver.irecv(found, 0).wait()
        assert found.eq(number).all()
    assert open_messages() == 1


def test_messages_of_two_senders_do_not_mix(ranks: Ranks) -> None:
    for sender in (0, 2):
        ranks.outboxes[sender].isend(torch.tensor([sender], dtype=torch.uint8), 1)
    for sender in (2, 0):
        data = torch.zeros(1, dtype=torch.uint8)
        ranks.outboxes[1].irecv(data, sender).wait()
        assert data.item() == sender


def test_a_message_of_another_length_is_refused(ranks: Ranks) -> None:
    ranks.outboxes[0].isend(torch.zeros(3, dtype=torch.uint8), 1)
    with pytest.raises(ProtocolError, match="rank 4 sent 3 bytes in group test; this one expects 4"):
        ranks.outboxes[1].irecv(torch.zeros(4, dtype=torch.uint8), 0).wait()


def test_a_box_has_room_until_as_many_messages_are_unread_as_it_has_slots(ranks: Ranks) -> None:
    sender, reader = ranks.outboxes[0], ranks.outboxes[1]
    for _ in range(OUTBOX_SLOTS):
        assert sender.has_room(1)
        sender.isend(torch.zeros(3, dtype=torch.uint8), 1)
    assert not sender.has_room(1)
    assert sender.has_room(2)
    receive = reader.irecv(torch.empty(3, dtype=torch.uint8), 0)
    assert receive.look(0.0)
    assert sender.has_room(1)


def test_who_only_looks_for_a_message_is_told_at_once_that_its_sender_has_gone(ranks: Ranks) -> None:
    receive = ranks.outboxes[1].irecv(torch.empty(3, dtype=torch.uint8), 0)
    began = time.perf_counter()
    assert not any(receive.look(0.0) for _ in range(100))
    assert time.perf_counter() - began < 0.1
    ranks.mailboxes[0].leave()
    with pytest.raises(PeerLost, match="it has left the epoch"):
        receive.look(0.0)
