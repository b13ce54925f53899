"""In which rounds experts travel, so that no rank sends two at once or receives two at once. numpy only.

The moves of a layer are the edges of a bipartite multigraph, senders on one side, receivers on the other; a round is a
colour. Such a graph takes no more colours than its largest degree (König, 1916), found by turning alternating paths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32, I32Matrix


def pair_rounds(fetches: I32Matrix, receivers: I32, first_slots: I32 | None = None) -> tuple[I32Matrix, I32]:
    """Share out the fetches of one layer over as few rounds as there can be.

    Args:
        fetches: int32 (n, 4) as in StageExperts: MoE layer, physical slot, source rank, slot of the copy there.
        receivers: int32 (n,), the rank that each goes to. Where it is the source the move is local: it occupies neither
            side, but a rank has at most one local move in a round.
        first_slots: int32 (n,), the first physical slot of each receiver. A local move out of a slot that an earlier
            fetch fills comes in a later round than that fetch; without ``first_slots`` it comes after all fetches of
            its rank that stand before it.

    Returns:
        The fetches round by round, in a round in the order in which they came, and int32 (rounds + 1,) bounds. There
        are as many rounds as some rank has most sends, receives or local moves, and more only where local moves wait.

    Raises InvalidConfig for arrays of other shapes, of several layers, or with a source that is no rank.
    """
    found = np.asarray(fetches, dtype=np.int32)
    targets = np.asarray(receivers, dtype=np.int32)
    starts = None if first_slots is None else np.asarray(first_slots, dtype=np.int32)
    _check(found, targets, starts)
    sources = found[:, 2].tolist()
    local = [source == target for source, target in zip(sources, targets.tolist(), strict=True)]
    rounds = _colour(sources, targets.tolist(), local)
    _place_local(found, targets, starts, local, rounds)
    order = np.argsort(np.asarray(rounds, dtype=np.int64), kind="stable")
    sizes = np.bincount(np.asarray(rounds, dtype=np.int64), minlength=0)
    bounds = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(sizes, dtype=np.int32)])
    return found[order], bounds.astype(np.int32)


def _check(fetches: I32Matrix, receivers: I32, first_slots: I32 | None) -> None:
    if fetches.ndim != 2 or fetches.shape[1] != 4:
        raise InvalidConfig("fetches", list(fetches.shape), "int32 (n, 4)")
    n = len(fetches)
    for name, array in (("receivers", receivers), ("first_slots", first_slots)):
        if array is not None and array.shape != (n,):
            raise InvalidConfig(name, list(array.shape), f"int32 ({n},), one for each fetch")
    if n and (fetches[:, 0] != fetches[0, 0]).any():
        raise InvalidConfig("fetches", f"MoE layers {np.unique(fetches[:, 0]).tolist()}", "fetches of one layer")
    if n and (fetches[:, 2] < 0).any():
        raise InvalidConfig("fetches", f"source {int(fetches[:, 2].min())}", "ranks from 0")


class _Side:
    """Which edge each rank of one side has in each round."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.edge: dict[int, dict[int, int]] = {rank: {} for rank in ranks}

    def free(self, rank: int) -> int:
        """The first round in which ``rank`` has nothing to do."""
        taken = self.edge[rank]
        return next(number for number in range(len(taken) + 1) if number not in taken)


def _colour(sources: Sequence[int], targets: Sequence[int], local: Sequence[bool]) -> list[int]:
    """The round of each move between ranks; 0 for local ones."""
    rounds = [0] * len(sources)
    ends = (sources, targets)
    sides = (_Side(sources), _Side(targets))
    for edge, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if local[edge]:
            continue
        sender, receiver = sides[0].edge[source], sides[1].edge[target]
        both = next(number for number in range(len(sender) + len(receiver) + 1) if _idle(number, sender, receiver))
        first, second = sides[0].free(source), sides[1].free(target)
        # One of the two rounds is below the degree of each; the other one is made free by turning the path over.
        if both > max(first, second):
            _turn(ends, sides, rounds, target, first, second)
            both = first
        rounds[edge] = both
        sender[both] = receiver[both] = edge
    return rounds


def _idle(number: int, sender: dict[int, int], receiver: dict[int, int]) -> bool:
    return number not in sender and number not in receiver


def _turn(
    ends: tuple[Sequence[int], Sequence[int]],
    sides: tuple[_Side, _Side],
    rounds: list[int],
    target: int,
    first: int,
    second: int,
) -> None:
    """Make round ``first`` free at receiver ``target``, where ``second`` is: the edges of the path from there that has
    the two in turn swap them. The path never comes to the sender that wants ``first``, which has no such edge."""
    path, side, rank, number = [], 1, target, first
    while (edge := sides[side].edge[rank].get(number)) is not None:
        path.append(edge)
        side = 1 - side
        rank = ends[side][edge]
        number = first + second - number
    for edge in path:
        for side in (0, 1):
            del sides[side].edge[ends[side][edge]][rounds[edge]]
        rounds[edge] = first + second - rounds[edge]
    for edge in path:
        for side in (0, 1):
            sides[side].edge[ends[side][edge]][rounds[edge]] = edge


def _place_local(
    fetches: I32Matrix, targets: I32, starts: I32 | None, local: Sequence[bool], rounds: list[int]
) -> None:
    """Give each local move the first round that it can have."""
    taken: dict[int, set[int]] = {}
    for move in np.flatnonzero(np.asarray(local, dtype=np.bool_)).tolist():
        rank = int(targets[move])
        before = targets[:move] == rank
        if starts is not None:
            before &= fetches[:move, 1] - starts[:move] == fetches[move, 3]
        first = max((rounds[other] + 1 for other in np.flatnonzero(before).tolist()), default=0)
        used = taken.setdefault(rank, set())
        rounds[move] = next(number for number in range(first, first + len(used) + 1) if number not in used)
        used.add(rounds[move])
