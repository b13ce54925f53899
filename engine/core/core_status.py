"""What the core tells of itself: groups, replicas, counts."""

from __future__ import annotations

from collections.abc import Sequence

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.dispatch import Dispatch
from drumline.engine.core.lockstep import LockstepGroup
from drumline.protocol.status import GroupStatus, ReplicaStatus


def group_status(config: CoreConfig, groups: Sequence[LockstepGroup]) -> tuple[GroupStatus, ...]:
    """Every lockstep group, by ascending id."""
    engines = config.replicas_per_group // config.attention_data_parallel_size
    return tuple(
        GroupStatus(
            id=index,
            replicas=tuple(range(index * engines, (index + 1) * engines)),
            epoch=group.epoch,
            wave=group.wave.number,
            wave_state=group.wave.state.value,
            step=group.next_step - 1,
            dummy_steps=group.dummy_steps,
        )
        for index, group in enumerate(groups)
    )


def replica_status(
    config: CoreConfig, groups: Sequence[LockstepGroup], dispatch: Dispatch
) -> tuple[ReplicaStatus, ...]:
    """Every attention replica, by ascending dp rank and attention rank. Rows of one that does not serve now are not
    running; they wait."""
    statuses: list[ReplicaStatus] = []
    for group in groups:
        for replica in range(group.replicas):
            dp_rank, attn_rank = divmod(len(statuses), config.attention_data_parallel_size)
            in_rows = int(group.residence.running[replica])
            running = in_rows if replica in group.serving else 0
            waiting = len(group.scheduler.waiting[replica]) + dispatch.held_on(len(statuses)) + in_rows - running
            statuses.append(
                ReplicaStatus(
                    dp_rank=dp_rank,
                    attn_rank=attn_rank,
                    running=running,
                    waiting=waiting,
                    blocks_total=group.pool.num_blocks[replica],
                    blocks_free=group.pool.available(replica),
                    blocks_cached=group.pool.cached(replica),
                )
            )
    return tuple(statuses)


def counters(config: CoreConfig, groups: Sequence[LockstepGroup]) -> dict[str, int]:
    """Counts since the start of the term, by name. With attention data parallel also what gathering costs, as
    ``attn_dp_`` and the names of :class:`~drumline.engine.core.gather_counts.GatherCounts`."""
    caches = [group.cache for group in groups if group.cache is not None]
    counts = {
        "steps": sum(group.steps for group in groups),
        "dummy_steps": sum(group.dummy_steps for group in groups),
        "admissions": sum(group.scheduler.admitted for group in groups),
        "preemptions": sum(group.scheduler.preemptions for group in groups),
        "chunked_prefills": sum(group.scheduler.chunked_prefills for group in groups),
        "prefix_queried_tokens": sum(cache.queried_tokens for cache in caches),
        "prefix_hit_tokens": sum(cache.hit_tokens for cache in caches),
    }
    if config.attention_data_parallel_size > 1:
        counts |= {
            "attn_dp_tokens": sum(group.gathers.tokens for group in groups),
            "attn_dp_padding_rows": sum(group.gathers.padding_rows for group in groups),
            "attn_dp_padded_steps": sum(group.gathers.padded_steps for group in groups),
            "attn_dp_packed_steps": sum(group.gathers.packed_steps for group in groups),
        }
    return counts
