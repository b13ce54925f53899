"""What the ranks of :mod:`tests.integration.workers.ranks` do with groups. Each function runs on every rank."""

from __future__ import annotations

import gc
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drumline.protocol.errors import ProtocolError
from drumline.workers.groups import GroupPlace, gloo_ops, shared_ops, sharing
from drumline.workers.groups.forming import meet
from drumline.workers.groups.nccl_ops import NcclOps
from drumline.workers.groups.pending import MAX_UNFINISHED_SENDS
from drumline.workers.groups.watch import Watch
from tests import default_group
from tests.integration.workers.group_checks import check_all, expect_same, made_by, sum_in_order

if TYPE_CHECKING:
    from tests.integration.workers.ranks import Rank


def every_operation(rank: Rank) -> str:
    group = rank.form_among("all", tuple(range(rank.world)), connect=True)
    assert (group.mailboxes is not None) == (rank.way == "memory" and rank.world > 1)
    check_all(group, (1, 3, 64))
    group.close()
    return "equal"


def messages_of_all_sizes(rank: Rank) -> str:
    """More than an outbox has slots, in them and beside them; waited for in another order than they were sent in."""
    group = rank.form_among("messages", (0, 1), connect=True)
    sizes = [1, 0, 70_000, 3, 65_536, 65_537, 300_000, 10] * 16
    other = 1 - rank.rank
    arriving = []
    for number, size in enumerate(sizes):
        arriving.append(group.irecv((size,), torch.uint8, other))
        group.isend(torch.full((size,), (number + rank.rank) % 251, dtype=torch.uint8), other)
        if number % 50 == 49:
            for back in range(50):
                expected = torch.full((sizes[number - back],), (number - back + other) % 251, dtype=torch.uint8)
                assert torch.equal(arriving[number - back].wait(), expected)
    group.barrier(5.0)
    group.close()
    return "equal"


def a_message_of_another_size(rank: Rank) -> str:
    group = rank.form_among("messages", (0, 1), connect=True)
    if rank.rank == 0:
        group.send(torch.zeros(3), 1)
        group.barrier(5.0)
        return ""
    group.barrier(5.0)
    try:
        group.recv((2,), torch.float32, 0)
    except ProtocolError as error:
        return error.text
    return "taken"


def many_rounds(rank: Rank) -> str:
    """Tensors that are many times as large as a mailbox (here: as what is used of it), and as the split sum wants."""
    shared_ops.SPLIT_SUM_BYTES = gloo_ops.SPLIT_SUM_BYTES = 512
    shared_ops.HALF_BYTES = 512  # type: ignore[attr-defined]
    check_all(rank.form_among("small", tuple(range(rank.world)), connect=True), (2, 200))
    return "equal"


def larger_than_a_mailbox(rank: Rank) -> str:
    group = rank.form()
    everyone = [made_by(member, (3 << 20,), torch.float32) for member in group.ranks]
    expect_same(group.all_reduce(everyone[rank.rank]), sum_in_order(everyone))
    expect_same(group.all_gather(everyone[rank.rank]), torch.cat(everyone))
    return "equal"


def writers_wait_for_slow_readers(rank: Rank) -> str:
    """Nobody answers a broadcast or a gather: their writers may run ahead, and must not overwrite what is unread."""
    group = rank.form()
    slow = rank.world - 1
    for round_ in range(40):
        if rank.rank == slow and round_ % 8 == 0:
            time.sleep(0.01)
        src = 0 if round_ < 20 else round_ % rank.world
        tensor = torch.full((300,), float(round_)) if rank.rank == src else torch.zeros(300)
        assert torch.equal(group.broadcast(tensor, src), torch.full((300,), float(round_)))
    for round_ in range(40):
        if rank.rank == slow and round_ % 8 == 0:
            time.sleep(0.01)
        found = group.gather(torch.full((200,), 100.0 * rank.rank + round_), slow)
        if found is not None:
            expected = [100.0 * member + round_ for member in range(rank.world)]
            assert found.view(rank.world, 200)[:, 7].tolist() == expected
        assert (found is None) == (rank.rank != slow)
    return "equal"


def two_groups_share_members(rank: Rank) -> dict[str, Any]:
    """Ranks 0 and 1 have a group already and form another with the rest; both go on working, in turns."""
    pair = rank.form_among("pair", (0, 1)) if rank.rank < 2 else None
    if pair is not None:
        assert pair.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    members = (3, 1, 0, 2)
    whole = rank.form_among("whole", members)
    for round_ in range(5):
        assert whole.all_gather(torch.tensor([rank.rank])).tolist() == list(members)
        if pair is not None:
            assert pair.all_gather(torch.tensor([10 * rank.rank + round_])).tolist() == [round_, 10 + round_]
    if pair is not None:
        pair.close()
    assert whole.all_reduce(torch.ones(1)).item() == 4.0
    return {
        "place": [whole.rank, whole.rank_in_group, whole.world_size],
        "neighbours": [whole.first_rank, whole.last_rank, whole.prev_rank, whole.next_rank],
        "ends": [whole.is_first_rank, whole.is_last_rank],
    }


def eight_processes(rank: Rank) -> str:
    check_all(rank.form_among("eight", tuple(range(rank.world)), connect=True), (2,), (torch.bfloat16,))
    return "equal"


def without_a_default_group(rank: Rank) -> str:
    default_group.shut()
    group = rank.form_among("mine", tuple(range(rank.world)), connect=True)
    check_all(group, (2,), (torch.float32,))
    group.close()
    assert default_group.is_shut()
    return "equal"


def who_shares_a_host(rank: Rank) -> dict[str, Any]:
    """The last rank is made to look as if it ran under another kernel."""
    together = rank.form_among("together", tuple(range(rank.world)))
    if rank.rank == rank.world - 1:
        sharing._kernel = lambda: "another"
    apart = rank.form_among("apart", tuple(range(rank.world)))
    assert apart.all_reduce(torch.ones(1)).item() == rank.world
    return {
        "together": [together.node_count, together.in_the_same_node_as(0), together.mailboxes is not None],
        "apart": [apart.node_count, apart.in_the_same_node_as(0), apart.in_the_same_node_as(2)],
        "mailboxes": apart.mailboxes is not None,
    }


def a_group_of_one_opens_nothing(rank: Rank) -> str:
    rank.port = 1  # where nothing listens
    before = {link.name for link in Path("/proc/self/fd").iterdir()}
    group = rank.form_among("alone", (rank.rank,), connect=True)
    check_all(group, (3,))
    assert group.in_the_same_node_as(rank.rank) == [True]
    assert group.node_count == 1
    assert (group.next_rank, group.prev_rank) == (rank.rank, rank.rank)
    assert {link.name for link in Path("/proc/self/fd").iterdir()} == before
    return "equal"


def an_unused_group_holds_no_memory(rank: Rank) -> int:
    """The most kB of any mailbox that are in memory."""
    group = rank.form()
    assert group.mailboxes is not None
    group.barrier(5.0)
    sizes = _mailbox_kb("Rss")
    assert len(sizes) == rank.world
    return max(sizes)


def _mailbox_kb(field: str) -> list[int]:
    """What the kernel says of every mapping of a mailbox."""
    sizes: list[int] = []
    inside = False
    with Path("/proc/self/smaps").open(encoding="ascii") as smaps:
        for line in smaps:
            if "-" in line.split(" ")[0]:
                inside = "drumline-mailbox" in line
            elif inside and line.startswith(f"{field}:"):
                sizes.append(int(line.split()[1]))
    return sizes


def random_operations(rank: Rank) -> str:
    """The same random operations on all ranks, in rounds of 256 bytes, with pauses of each rank's own."""
    shared_ops.SPLIT_SUM_BYTES = 2048
    shared_ops.HALF_BYTES = 256 * rank.world  # type: ignore[attr-defined]
    group, chance, own_chance = rank.form(), random.Random(11), random.Random(rank.rank)
    for _ in range(150 if group.mailboxes is not None else 25):
        if own_chance.random() < 0.1:
            time.sleep(own_chance.random() * 0.004)
        rows, seed, root = chance.randrange(40), chance.randrange(1000), chance.randrange(rank.world)
        counts = [chance.randrange(30) for _ in range(rank.world)]
        everyone = [made_by(member, (rows, 5), torch.float32, seed) for member in group.ranks]
        uneven = [made_by(member, (count, 2), torch.int64, seed) for member, count in enumerate(counts)]
        operation = chance.randrange(5)
        if operation == 0:
            expect_same(group.all_reduce(everyone[rank.rank]), sum_in_order(everyone))
        elif operation == 1:
            expect_same(group.all_gather_rows(uneven[rank.rank], counts), torch.cat(uneven))
        elif operation == 2:
            gathered = group.gather(everyone[rank.rank], root)
            if rank.rank == root:
                expect_same(gathered, torch.cat(everyone))
        elif operation == 3:
            mine = everyone[root].clone() if rank.rank == root else torch.zeros(rows, 5)
            expect_same(group.broadcast(mine, root), everyone[root])
        else:
            arrived = torch.empty(sum(counts[member] for member in group.ranks), 2, dtype=torch.int64)
            source = torch.cat([uneven[rank.rank]] * rank.world)
            group.all_to_all(arrived, source, counts, [counts[rank.rank]] * rank.world)
            expect_same(arrived, torch.cat(uneven))
    return "equal"


def operations_of_a_device(rank: Rank) -> str:
    """What is asked of NCCL, asked of gloo, which has the same calls."""
    place = GroupPlace(1, 1, rank.rank, tuple(range(rank.world)), "127.0.0.1", rank.port, torch.device("cpu"))
    watch = Watch("device", place, rank.abort, rank.progress, 10.0)
    formed = meet(watch, 10.0, threading.Event(), connect=True, share=False)
    ops, me = NcclOps(formed.gloo, watch, rank.rank, rank.world), rank.rank
    everyone = [made_by(member, (4,), torch.float32) for member in place.members]
    out = torch.empty(4)
    ops.all_reduce(out, everyone[me])
    assert torch.allclose(out, sum_in_order(everyone))
    counts = [member + 1 for member in place.members]
    for sizes in ([4] * rank.world, counts):
        parts = [one.repeat(2)[:size] for one, size in zip(everyone, sizes, strict=True)]
        out = torch.empty(sum(sizes))
        ops.all_gather(out, parts[me], sizes)
        expect_same(out, torch.cat(parts))
        ops.gather(out.zero_() if me == 1 else None, parts[me], sizes, 1)
        if me == 1:
            expect_same(out, torch.cat(parts))
    # Of uneven parts alone: gloo does not tell when its own sum of even ones is there.
    tall = [made_by(member, (sum(counts),), torch.float32, 1) for member in place.members]
    share = torch.empty(counts[me])
    ops.reduce_scatter(share, tall[me], counts)
    assert torch.allclose(share, sum_in_order(tall).split_with_sizes(counts)[me])
    mine = everyone[1].clone() if me == 1 else torch.zeros(4)
    ops.broadcast(mine, 1)
    expect_same(mine, everyone[1])
    return "equal"


def a_closed_group_leaves_no_memory(rank: Rank) -> list[int]:
    """The mappings while a group is there, and when it has been closed and dropped; nothing is collected meanwhile."""
    gc.disable()
    group = rank.form_among("mapped", tuple(range(rank.world)), connect=True)
    group.all_reduce(torch.ones(3))
    arriving = group.irecv((3,), torch.float32, group.prev_rank)
    group.isend(torch.ones(3), group.next_rank)
    assert arriving.wait().tolist() == [1.0] * 3
    group.barrier(5.0)
    before = len(_mailbox_kb("Rss"))
    group.close()
    del group, arriving
    return [before, len(_mailbox_kb("Rss"))]


def refused_arguments(rank: Rank) -> list[str]:
    """Nothing has been sent when arguments are refused: the group is as good as before."""
    group = rank.form()
    rows = torch.zeros(2, 3)
    attempts: list[Any] = [
        lambda: group.broadcast(rows, 7),
        lambda: group.gather(rows, 0, 2),
        lambda: group.all_gather_rows(rows, [3] * rank.world),
        lambda: group.gather_columns(rows, [4] * rank.world, 0),
        lambda: group.reduce_scatter(rows),
        lambda: group.reduce_scatter_rows(rows, [2] * rank.world),
        lambda: group.all_reduce(rows > 0),
        lambda: group.all_to_all(rows, rows, [0] * rank.world, [0] * rank.world),
        lambda: group.send(rows, rank.rank),
        lambda: group.send(rows, group.next_rank),
        lambda: group.broadcast_object(object(), rank.rank),
    ]
    refused = []
    for attempt in attempts:
        try:
            attempt()
        except ProtocolError as error:
            refused.append(error.text)
    assert group.all_reduce(torch.ones(1)).item() == rank.world
    return refused


def room_for_messages(rank: Rank) -> bool:
    """Rank 0 sends while it need not wait; rank 1 takes nothing in until it has been told how many there are."""
    group = rank.form_among("room", (0, 1), connect=True)
    large = 100_000
    if rank.rank == 0:
        sent = 0
        while group.has_room(1) and sent < 2 * MAX_UNFINISHED_SENDS:
            group.isend(torch.full((large,), sent, dtype=torch.uint8), 1)
            sent += 1
        full = not group.has_room(1)
        group.broadcast(torch.tensor([sent]), 0)
        deadline = time.monotonic() + 10.0
        while not group.has_room(1):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        found = [full, sent == MAX_UNFINISHED_SENDS]
    else:
        count = int(group.broadcast(torch.tensor([0]), 0))
        receives = [group.irecv((large,), torch.uint8, 0) for _ in range(count)]
        found = [bool((receive.wait() == number).all()) for number, receive in enumerate(receives)]
    group.barrier(5.0)
    group.close()
    return all(found)
