"""What the operations of a group must bring: each check runs on every rank of it at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drumline.workers.groups import GroupCoordinator

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def made_by(rank: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The tensor that a rank brings: all can make it, so all know what to expect."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(-1000, 1000, tuple(shape), generator=generator, dtype=dtype)


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Added from left to right; bfloat16 in float32, rounded once."""
    wide = torch.float32 if parts[0].dtype is torch.bfloat16 else parts[0].dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def expect_same(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def _check_gathers(group: GroupCoordinator, dtype: torch.dtype, rows: int) -> None:
    world, me, ranks = group.world_size, group.rank_in_group, group.ranks
    everyone = [made_by(rank, (rows, 6), dtype) for rank in ranks]
    for dim in (0, 1, -1):
        expect_same(group.all_gather(everyone[me], dim), torch.cat(everyone, dim))
    expect_same(group.all_gather(everyone[me].t(), 0), torch.cat([one.t() for one in everyone]))
    counts = [(rows * position) % 7 for position in range(world)]
    uneven = [made_by(rank, (count, 3), dtype) for rank, count in zip(ranks, counts, strict=True)]
    expect_same(group.all_gather_rows(uneven[me], counts), torch.cat(uneven))
    widths = [(5 * position + 3) % 4 for position in range(world)]
    columns = [made_by(rank, (rows, width), dtype) for rank, width in zip(ranks, widths, strict=True)]
    for dst in ranks:
        gathered, joined = group.gather(everyone[me], dst, 1), group.gather_columns(columns[me], widths, dst)
        if dst == group.rank:
            expect_same(gathered, torch.cat(everyone, 1))
            expect_same(joined, torch.cat(columns, 1))
        else:
            assert gathered is None
            assert joined is None


def _check_sums(group: GroupCoordinator, dtype: torch.dtype, rows: int) -> None:
    world, me, ranks = group.world_size, group.rank_in_group, group.ranks
    everyone = [made_by(rank, (rows, 6), dtype, 1) for rank in ranks]
    kept = everyone[me].clone()
    expect_same(group.all_reduce(everyone[me]), sum_in_order(everyone))
    assert torch.equal(everyone[me], kept)
    expect_same(group.all_reduce(everyone[me][0, 0]), sum_in_order([one[0, 0] for one in everyone]))
    wide = [made_by(rank, (rows, 3 * world), dtype, 2) for rank in ranks]
    expect_same(group.reduce_scatter(wide[me], 1), sum_in_order(wide)[:, 3 * me : 3 * me + 3].contiguous())
    counts = [(rows + 2 * position) % 5 for position in range(world)]
    tall = [made_by(rank, (sum(counts), 4), dtype, 3) for rank in ranks]
    start = sum(counts[:me])
    expect_same(group.reduce_scatter_rows(tall[me], counts), sum_in_order(tall)[start : start + counts[me]])


def _check_exchanges(group: GroupCoordinator, dtype: torch.dtype, rows: int) -> None:
    world, me, ranks = group.world_size, group.rank_in_group, group.ranks

    def splits(position: int) -> list[int]:
        return [(rows + position * 3 + other) % 6 for other in range(world)]

    sources = [made_by(rank, (sum(splits(position)), 5), dtype, 4) for position, rank in enumerate(ranks)]
    received = [splits(position)[me] for position in range(world)]
    output = torch.empty(sum(received), 5, dtype=dtype)
    group.all_to_all(output, sources[me], received, splits(me))
    segments = [source.split_with_sizes(splits(position)) for position, source in enumerate(sources)]
    expect_same(output, torch.cat([each[me] for each in segments]))
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
    expect_same(arriving.wait(), made_by(group.prev_rank, (3, rows), dtype, 6).t().contiguous())
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


def _check_objects(group: GroupCoordinator) -> None:
    for src in group.ranks:
        for obj in ({"rank": src, "few": [1, 2]}, "x" * (5000 + src), None):
            mine = obj if group.rank == src else "not this"
            assert group.broadcast_object(mine, src) == obj
    group.barrier(5.0)


def check_all(group: GroupCoordinator, row_counts: Sequence[int], dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    for dtype in dtypes:
        for rows in row_counts:
            _check_gathers(group, dtype, rows)
            _check_sums(group, dtype, rows)
            _check_exchanges(group, dtype, rows)
            if group.world_size > 1:
                _check_messages(group, dtype, rows)
    _check_objects(group)
