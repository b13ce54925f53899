"""What the ranks of :mod:`tests.integration.workers.ranks` do with groups. Each function runs on every rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from drumline.protocol.errors import ProtocolError
from drumline.workers import gloo_ops, shared_ops, sharing
from drumline.workers.groups import GroupCoordinator

if TYPE_CHECKING:
    from tests.integration.workers.ranks import Rank

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def made_by(rank: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The tensor that a rank brings: all can make it, so all know what to expect."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(-1000, 1000, tuple(shape), generator=generator, dtype=dtype)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Added from left to right; bfloat16 in float32, rounded once."""
    wide = torch.float32 if parts[0].dtype is torch.bfloat16 else parts[0].dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def _same(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def _check_gathers(group: GroupCoordinator, dtype: torch.dtype, rows: int) -> None:
    world, me, ranks = group.world_size, group.rank_in_group, group.ranks
    everyone = [made_by(rank, (rows, 6), dtype) for rank in ranks]
    for dim in (0, 1, -1):
        _same(group.all_gather(everyone[me], dim), torch.cat(everyone, dim))
    _same(group.all_gather(everyone[me].t(), 0), torch.cat([one.t() for one in everyone]))
    counts = [(rows * position) % 7 for position in range(world)]
    uneven = [made_by(rank, (count, 3), dtype) for rank, count in zip(ranks, counts, strict=True)]
    _same(group.all_gather_rows(uneven[me], counts), torch.cat(uneven))
    widths = [(5 * position + 3) % 4 for position in range(world)]
    columns = [made_by(rank, (rows, width), dtype) for rank, width in zip(ranks, widths, strict=True)]
    for dst in ranks:
        gathered, joined = group.gather(everyone[me], dst, 1), group.gather_columns(columns[me], widths, dst)
        if dst == group.rank:
            _same(gathered, torch.cat(everyone, 1))
            _same(joined, torch.cat(columns, 1))
        else:
            assert gathered is None
            assert joined is None


def _check_sums(group: GroupCoordinator, dtype: torch.dtype, rows: int) -> None:
    world, me, ranks = group.world_size, group.rank_in_group, group.ranks
    everyone = [made_by(rank, (rows, 6), dtype, 1) for rank in ranks]
    kept = everyone[me].clone()
    _same(group.all_reduce(everyone[me]), _sum(everyone))
    assert torch.equal(everyone[me], kept)
    _same(group.all_reduce(everyone[me][0, 0]), _sum([one[0, 0] for one in everyone]))
    wide = [made_by(rank, (rows, 3 * world), dtype, 2) for rank in ranks]
    _same(group.reduce_scatter(wide[me], 1), _sum(wide)[:, 3 * me : 3 * me + 3].contiguous())
    counts = [(rows + 2 * position) % 5 for position in range(world)]
    tall = [made_by(rank, (sum(counts), 4), dtype, 3) for rank in ranks]
    start = sum(counts[:me])
    _same(group.reduce_scatter_rows(tall[me], counts), _sum(tall)[start : start + counts[me]])


def _check_exchanges(group: GroupCoordinator, dtype: torch.dtype, rows: int) -> None:
    world, me, ranks = group.world_size, group.rank_in_group, group.ranks

    def splits(position: int) -> list[int]:
        return [(rows + position * 3 + other) % 6 for other in range(world)]

    sources = [made_by(rank, (sum(splits(position)), 5), dtype, 4) for position, rank in enumerate(ranks)]
    received = [splits(position)[me] for position in range(world)]
    output = torch.empty(sum(received), 5, dtype=dtype)
    group.all_to_all(output, sources[me], received, splits(me))
    _same(output, torch.cat([source.split_with_sizes(splits(position))[me] for position, source in enumerate(sources)]))
    for src in ranks:
        expected = made_by(src, (rows, 3), dtype, 5)
        mine = expected.clone() if src == group.rank else torch.zeros(rows, 3, dtype=dtype)
        assert group.broadcast(mine, src) is mine
        assert torch.equal(mine, expected)
        strided = expected.t().contiguous().t() if src == group.rank else torch.zeros(3, rows, dtype=dtype).t()
        assert torch.equal(group.broadcast(strided, src), expected)


def _check_messages(group: GroupCoordinator, dtype: torch.dtype, rows: int) -> None:
    """Around the ring, with a collective in between."""
    arriving = group.irecv((rows, 3), dtype, group.prev_rank)
    leaving = group.isend(made_by(group.rank, (3, rows), dtype, 6).t(), group.next_rank)
    group.all_reduce(torch.ones(2))
    _same(arriving.wait(), made_by(group.prev_rank, (3, rows), dtype, 6).t().contiguous())
    leaving.wait()
    sent = {"a": made_by(group.rank, (rows, 2), dtype, 7), "n": rows, "none": torch.zeros(0, 4), "who": [group.rank]}
    if group.is_first_rank:
        group.send_tensor_dict(sent, group.next_rank)
    found = group.recv_tensor_dict(group.prev_rank)
    if not group.is_first_rank:
        group.send_tensor_dict(sent, group.next_rank)
    assert list(found) == ["a", "n", "none", "who"]
    assert torch.equal(found["a"], made_by(group.prev_rank, (rows, 2), dtype, 7))
    assert found["none"].shape == (0, 4)
    assert (found["n"], found["who"]) == (rows, [group.prev_rank])


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


def _check_objects(group: GroupCoordinator) -> None:
    for src in group.ranks:
        for obj in ({"rank": src, "few": [1, 2]}, "x" * (5000 + src), None):
            mine = obj if group.rank == src else "not this"
            assert group.broadcast_object(mine, src) == obj
    group.barrier(5.0)


def _check_all(group: GroupCoordinator, row_counts: Sequence[int], dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    for dtype in dtypes:
        for rows in row_counts:
            _check_gathers(group, dtype, rows)
            _check_sums(group, dtype, rows)
            _check_exchanges(group, dtype, rows)
            if group.world_size > 1:
                _check_messages(group, dtype, rows)
    _check_objects(group)


def every_operation(rank: Rank) -> str:
    group = rank.form_among("all", tuple(range(rank.world)), connect=True)
    assert (group.mailboxes is not None) == (rank.way == "memory" and rank.world > 1)
    _check_all(group, (1, 3, 64))
    group.close()
    return "equal"


def many_rounds(rank: Rank) -> str:
    """Tensors that are many times as large as a mailbox (here: as what is used of it), and as the split sum wants."""
    shared_ops.SPLIT_SUM_BYTES = gloo_ops.SPLIT_SUM_BYTES = 512
    shared_ops.HALF_BYTES = 512  # type: ignore[attr-defined]
    _check_all(rank.form_among("small", tuple(range(rank.world)), connect=True), (2, 200))
    return "equal"


def larger_than_a_mailbox(rank: Rank) -> str:
    group = rank.form()
    everyone = [made_by(member, (3 << 20,), torch.float32) for member in group.ranks]
    _same(group.all_reduce(everyone[rank.rank]), _sum(everyone))
    _same(group.all_gather(everyone[rank.rank]), torch.cat(everyone))
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
    _check_all(rank.form_among("eight", tuple(range(rank.world)), connect=True), (2,), (torch.bfloat16,))
    return "equal"


def without_a_default_group(rank: Rank) -> str:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch's default process group was asked for")

    world = distributed.distributed_c10d
    for name in ("init_process_group", "new_group", "_get_default_group", "_get_default_store", "_get_group_size"):
        assert hasattr(world, name)
        setattr(world, name, refuse)
        if hasattr(distributed, name):
            setattr(distributed, name, refuse)
    group = rank.form_among("mine", tuple(range(rank.world)), connect=True)
    _check_all(group, (2,), (torch.float32,))
    group.close()
    assert not distributed.is_initialized()
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
    _check_all(group, (3,))
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
