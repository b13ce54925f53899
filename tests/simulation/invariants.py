"""What must hold in the core after every event."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.batch_table import DECODE, DETACHED, FREE, LEFT, PREFILL
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.wave import WaveState
from tests.simulation.worker import RuleBrokenError


def groups_of(core: EngineCore) -> list[LockstepGroup]:
    return core._groups


def check_blocks(group: LockstepGroup) -> None:
    """Every block is free or held, never both, and its count of users is the number of rows that hold it."""
    table, pool = group.table, group.pool
    users = np.bincount(table.blocks.ravel(), minlength=pool.first[-1])
    users[0] = 0
    if not np.array_equal(users, pool.refs):
        wrong = np.flatnonzero(users != pool.refs).tolist()
        raise RuleBrokenError(f"blocks {wrong}: users {users[wrong].tolist()}, counted {pool.refs[wrong].tolist()}")
    for replica, total in enumerate(pool.num_blocks):
        held = int(np.count_nonzero(users[pool.first[replica] : pool.first[replica + 1]]))
        if held + pool.available(replica) != total:
            raise RuleBrokenError(f"replica {replica}: {held} blocks held, {pool.available(replica)} free of {total}")


def check_rows(group: LockstepGroup) -> None:
    """Rows without blocks are only those that have left, and ``known`` never overtakes ``length``."""
    table = group.table
    for row in np.flatnonzero(table.status != FREE).tolist():
        sequence = table.sequences[row]
        if sequence is None or sequence.row != row:
            raise RuleBrokenError(f"row {row} is taken by nobody")
        if table.status[row] in (DETACHED, LEFT):
            if table.num_blocks[row] != 0:
                raise RuleBrokenError(f"row {row} has left with {table.num_blocks[row]} blocks")
        elif table.known[row] > table.length[row]:
            raise RuleBrokenError(f"row {row} knows {table.known[row]} of {table.length[row]} tokens")


def check_prefix_cache(group: LockstepGroup) -> None:
    """Each row carries the hash state of its own text, and each index entry leads to a block of that key, or to one
    that has been given away and waits for the purge."""
    if group.cache is None:
        return
    table = group.table
    for row in np.flatnonzero((table.status == PREFILL) | (table.status == DECODE)).tolist():
        hashed = int(table.hashed[row])
        if hashed == 0:
            continue
        sequence = table.sequences[row]
        if sequence is None:
            raise RuleBrokenError(f"row {row} is taken by nobody")
        text = group.known_tokens(sequence)
        states = group.cache.hasher.states(text)
        if not np.array_equal(states[hashed - 1], table.prefix_state[row]):
            raise RuleBrokenError(f"row {row}: wrong hash state after {hashed} blocks")
        if hashed * table.block_size > table.filled[row]:
            raise RuleBrokenError(f"row {row}: {hashed} blocks hashed, {table.filled[row]} entries filled")
    waiting = sum(len(blocks) for blocks, _ in group.pool.lost)
    if len(group.cache) > int(np.count_nonzero(group.pool.keyed)) + waiting:
        raise RuleBrokenError(f"{len(group.cache)} index entries for {np.count_nonzero(group.pool.keyed)} keyed blocks")


def check_at_rest(core: EngineCore) -> None:
    """Nothing is left over once every request has ended and every answer has come."""
    if not core.idle:
        raise RuleBrokenError("requests have ended and the core is not idle")
    for index, group in enumerate(groups_of(core)):
        if group.wave.state is not WaveState.PAUSED:
            raise RuleBrokenError(f"group {index}: wave {group.wave.number} is still running")
        taken = np.flatnonzero(group.table.status != FREE).tolist()
        if taken:
            raise RuleBrokenError(f"group {index}: rows {taken} are not free")
        if group.table.blocks.any() or group.pool.refs.any():
            raise RuleBrokenError(f"group {index}: blocks are still held")
    for replica in core.replica_status():
        if replica.running or replica.waiting or replica.blocks_free != replica.blocks_total:
            raise RuleBrokenError(f"not at rest: {replica}")
