"""The tensor groups of an epoch.

Each group is a process group of its own on the epoch's store; torch's global default group is never made. CPU tensors
go through memory that the ranks share (:mod:`drumline.workers.groups.shared_ops`) or, where they cannot, over gloo;
tensors on a GPU go over NCCL. What a group leaves behind belongs to the epoch: buffers given to a collective that was
aborted are never used again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.objects import decode_object, encode_object
from drumline.workers.abort import AbortFlag
from drumline.workers.groups import arguments, packed
from drumline.workers.groups.forming import meet
from drumline.workers.groups.member import GroupMember
from drumline.workers.groups.pending import PendingRecv, PendingSend
from drumline.workers.groups.place import GroupPlace
from drumline.workers.groups.sockets import run_aside
from drumline.workers.groups.watch import (
    COLLECTIVE_DEADLINE_S,
    FORM_DEADLINE_S,
    Watch,
)
from drumline.workers.progress import Progress


class GroupCoordinator(GroupMember):
    """One group of ranks: its collectives, its messages between two ranks, their deadlines.

    Used by the main thread alone. Every member calls the same collectives in the same order with the same shapes, or
    with the counts that belong to them; ``src`` and ``dst`` are global ranks. Tensors may be strided; results are new
    and contiguous. Messages between two ranks need ``connect`` and may be mixed with collectives in any order.

    Errors of every operation: EpochAborted, PeerLost, GroupTimeout. After any of them the group is of no use and
    :meth:`close` must be called. ProtocolError for arguments that do not fit the group, before anything is sent.

    Attributes:
        name: what the group is called in errors and on the store.
        ranks: the global ranks in group order; ``rank`` this one, ``rank_in_group`` its position (``position`` too).
        world_size: how many there are (``size`` too).
        first_rank, last_rank, next_rank, prev_rank: global ranks; the last one's next is the first.
        device: where tensors lie by default.
        mailboxes: the memory that the ranks share, for exchanges of their own; None on CUDA or where they share none.
        node_count: on how many hosts the ranks are, as far as shared memory tells.
    """

    # --------------------------------------------------------------------------------------------------- collectives

    def all_reduce(self, t: Tensor) -> Tensor:
        """The sum over all ranks; the same bits on every rank. On the CPU it is added in rank order.

        16-bit floats are added in float32 there and rounded once.
        """
        flat = arguments.summable(t).contiguous().view(-1)
        out = torch.empty_like(flat)
        with self._watch:
            if len(flat):
                self._ops(t).all_reduce(out, flat)
        return out.view(t.shape)

    def all_gather(self, t: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks, of one shape, concatenated along ``dim`` in rank order."""
        dim = arguments.check_dim(t, dim)
        gathered = self._gather_flat(t, [t.numel()] * self.size, None)
        return arguments.concatenate(gathered, t, dim, self.size)

    def all_gather_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        """(sum(counts), ...): ``counts[r]`` rows from position r, where it may be 0, in rank order."""
        self.check_counts(counts, arguments.count_rows(t))
        counts = arguments.plain(counts)
        width = t.shape[1:].numel()
        gathered = self._gather_flat(t, [count * width for count in counts], None)
        return gathered.view(sum(counts), *t.shape[1:])

    def gather(self, t: Tensor, dst: int, dim: int = 0) -> Tensor | None:
        """As :meth:`all_gather`, on rank ``dst``; None on the others."""
        dim, position = arguments.check_dim(t, dim), self._position_of("dst", dst)
        gathered = self._gather_flat(t, [t.numel()] * self.size, position)
        return arguments.concatenate(gathered, t, dim, self.size) if dst == self.rank else None

    def gather_columns(self, t: Tensor, widths: Sequence[int], dst: int) -> Tensor | None:
        """(n, sum(widths)) on rank ``dst``, where position r brings (n, widths[r]); None on the others."""
        position = self._position_of("dst", dst)
        if t.dim() != 2 or len(widths) != self.size or widths[self.position] != t.shape[1]:
            raise ProtocolError(f"t: found shape {list(t.shape)}; valid: 2 dimensions, widths {list(widths)}")
        n, widths = t.shape[0], arguments.plain(widths)
        counts = [n * width for width in widths]
        gathered = self._gather_flat(t, counts, position)
        if dst != self.rank:
            return None
        parts = gathered.split_with_sizes(counts)
        return torch.cat([part.view(n, width) for part, width in zip(parts, widths, strict=True)], 1)

    def reduce_scatter(self, t: Tensor, dim: int = 0) -> Tensor:
        """This rank's of as many equal parts along ``dim`` as there are ranks, summed as by :meth:`all_reduce`."""
        dim = arguments.check_dim(t, dim)
        share, more = divmod(t.shape[dim], self.size)
        if more:
            raise ProtocolError(f"dim {dim}: found length {t.shape[dim]}; valid: a multiple of {self.size}")
        rows = self.reduce_scatter_rows(t.movedim(dim, 0), [share] * self.size)
        return rows.movedim(0, dim).contiguous()

    def reduce_scatter_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        """(counts[r], ...) at position r: its rows of ``t`` (sum(counts), ...), summed as by :meth:`all_reduce`."""
        if len(counts) != self.size or sum(counts) != arguments.count_rows(arguments.summable(t)):
            raise ProtocolError(
                f"counts: found {list(counts)}; valid: {self.size} that add up to {arguments.count_rows(t)} rows"
            )
        counts = arguments.plain(counts)
        width = t.shape[1:].numel()
        out = t.new_empty(counts[self.position] * width)
        with self._watch:
            if t.numel():
                flat = t.contiguous().view(-1)
                self._ops(t).reduce_scatter(out, flat, [count * width for count in counts])
        return out.view(counts[self.position], *t.shape[1:])

    def all_to_all(
        self, output: Tensor, source: Tensor, output_splits: Sequence[int], source_splits: Sequence[int]
    ) -> None:
        """Send ``source_splits[r]`` rows of ``source`` to each position r, receive ``output_splits[r]`` rows from it.

        Both tensors are contiguous, of one dtype and row width; splits may be 0. Returns when the rows are there.
        """
        width = source.shape[1:].numel() * source.element_size()
        for name, tensor, splits in (("output", output, output_splits), ("source", source, source_splits)):
            if len(splits) != self.size or sum(splits) != arguments.count_rows(tensor) or not tensor.is_contiguous():
                valid = f"contiguous rows, {self.size} splits that add up to them"
                raise ProtocolError(f"{name}: found shape {list(tensor.shape)}, splits {list(splits)}; valid: {valid}")
        if output_splits[self.position] != source_splits[self.position]:
            own = (output_splits[self.position], source_splits[self.position])
            raise ProtocolError(f"splits: found {own[1]} rows for this rank itself; valid: {own[0]}, as output has")
        received = [count * width for count in arguments.plain(output_splits)]
        sent = [count * width for count in arguments.plain(source_splits)]
        with self._watch:
            if width:
                self._ops(source).all_to_all(arguments.as_bytes(output), arguments.as_bytes(source), received, sent)

    def broadcast(self, t: Tensor, src: int) -> Tensor:
        """``t`` itself, which holds what it holds on rank ``src``."""
        position = self._position_of("src", src)
        flat = t.contiguous()
        with self._watch:
            if t.numel():
                self._ops(t).broadcast(arguments.as_bytes(flat), position)
        return t if flat is t or position == self.position else t.copy_(flat)

    def broadcast_object(self, obj: Any, src: int, as_type: Any = Any) -> Any:
        """``src``'s object decoded as ``as_type``; on ``src`` itself ``obj`` as it is.

        Objects are what msgspec's msgpack carries, at most 8 MiB. Raises ProtocolError for others.
        """
        position = self._position_of("src", src)
        if position == self.position:
            parts = packed.cut(encode_object(obj))
            with self._watch:
                for part in parts:
                    self._cpu_ops.broadcast(part, position)
            return obj
        with self._watch:
            head = torch.empty(packed.HEAD_BYTES, dtype=torch.uint8)
            self._cpu_ops.broadcast(head, position)
            rest = torch.empty(packed.rest_of(head), dtype=torch.uint8)
            if len(rest):
                self._cpu_ops.broadcast(rest, position)
        return decode_object(packed.join(head, rest), as_type)

    def barrier(self, timeout_s: float) -> None:
        """Return when all ranks have called this. The GroupTimeout after ``timeout_s`` names those that have not."""
        with self._watch:
            self._cpu_ops.barrier(timeout_s)

    def _gather_flat(self, t: Tensor, counts: Sequence[int], dst: int | None) -> Tensor:
        """(sum(counts),): what every position brings, at position ``dst`` alone unless it is None."""
        here = dst is None or dst == self.position
        out = t.new_empty(sum(counts) if here else 0)
        with self._watch:
            if not any(counts):
                return out
            own, to_bytes = arguments.as_bytes(t.contiguous()), t.element_size()
            lengths = [count * to_bytes for count in counts]
            if dst is None:
                self._ops(t).all_gather(arguments.as_bytes(out), own, lengths)
            else:
                self._ops(t).gather(arguments.as_bytes(out) if here else None, own, lengths, dst)
        return out

    # ------------------------------------------------------------------------------------------ messages of two ranks

    def isend(self, t: Tensor, dst: int) -> PendingSend:
        """Start to send ``t``, which must not be written to before ``wait()`` of the result has returned.

        At most 64 sends of a group are unfinished; one more waits for the oldest.
        """
        return self._transfer("dst", dst).isend(t, self.ranks.index(dst))

    def has_room(self, dst: int) -> bool:
        """Whether :meth:`isend` to ``dst`` returns at once, however long ``dst`` reads nothing.

        Always on CUDA: there the order in which messages of both directions are started must not change.
        """
        return self.device.type == "cuda" or self._transfer("dst", dst).has_room(self.ranks.index(dst))

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> PendingRecv:
        """Post the receive of what ``src`` sends next; ``wait()`` of the result returns it, on the group's device."""
        return self._transfer("src", src).irecv(shape, dtype, self.ranks.index(src), self.device)

    def send(self, t: Tensor, dst: int) -> None:
        """Send ``t``; returns when it may be written to again."""
        self.isend(t, dst).wait()

    def recv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> Tensor:
        """What ``src`` sends next, on the group's device."""
        return self.irecv(shape, dtype, src).wait()

    def send_tensor_dict(self, tensors: Mapping[str, Any], dst: int) -> None:
        """Send tensors, and what msgspec's msgpack carries, by name. Returns when all of it may be changed again."""
        self._transfer("dst", dst).send_tensor_dict(tensors, self.ranks.index(dst))

    def recv_tensor_dict(self, src: int) -> dict[str, Any]:
        """What ``src`` sends next by :meth:`send_tensor_dict`, in the same order."""
        return self._transfer("src", src).recv_tensor_dict(self.ranks.index(src), self.device)


def form_group(
    name: str,
    place: GroupPlace,
    abort: AbortFlag,
    progress: Progress,
    deadline_s: float = FORM_DEADLINE_S,
    *,
    connect: bool = False,
    collective_deadline_s: float = COLLECTIVE_DEADLINE_S,
    share: bool = True,
) -> GroupCoordinator:
    """Meet the other ranks on the epoch's store and share memory with them or, where that cannot be, connect to all.

    It runs on a side thread, so that a newer epoch, or the end of the process, can abandon it. A group of one rank
    meets nobody and opens nothing.

    Args:
        connect: two ranks of the group will send each other messages. Where memory is not shared, sockets are made at
            once then; else at the first collective, because gloo's thread wakes a hundred times a second from there on,
            in an idle engine too. Where memory is shared there are no sockets.
        collective_deadline_s: how long an operation may wait for other ranks.
        share: whether memory may be shared; where one rank says no, none does.

    Raises:
        EpochAborted: the epoch ended meanwhile.
        StoreError: a rank did not come to the store within ``deadline_s``, or the store went away; names the ranks.
        GroupTimeout: all came, and the connections were not made in time.
        PeerLost: a rank went away while the connections were made.
    """
    watch = Watch(name, place, abort, progress, collective_deadline_s)
    watch.check()
    if place.size == 1:
        return GroupCoordinator(None, watch, connect=connect)
    abandoned = threading.Event()
    try:
        formed = run_aside(lambda: meet(watch, deadline_s, abandoned, connect=connect, share=share), watch, deadline_s)
    finally:
        abandoned.set()
    return GroupCoordinator(formed, watch, connect=connect)
