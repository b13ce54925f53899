"""Collectives among ranks of one host, through their mailboxes.

Tensors are flat and contiguous, on the CPU. What does not fit a half of a mailbox goes through it in rounds; how many
follows from sizes that all ranks know, except in :meth:`SharedOps.all_to_all`, where the ranks tell each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drumline.workers.groups.mailboxes import HALF_BYTES, Mailboxes
from drumline.workers.groups.sums import add_in_order, even_counts

# From here on each rank adds up its share and fetches the others', instead of adding up everything.
SPLIT_SUM_BYTES = 192 << 10


class SharedOps:
    """The operations that :class:`drumline.workers.groups.GroupCoordinator` needs, over mailboxes."""

    def __init__(self, boxes: Mailboxes, size: int) -> None:
        self._boxes = boxes
        self._size = size

    def all_gather(self, out: Tensor, own: Tensor, counts: Sequence[int]) -> None:
        """``out`` (sum(counts),) becomes the concatenation of every rank's ``own`` (counts[position],)."""
        self._gather(out, own, counts, None)

    def gather(self, out: Tensor | None, own: Tensor, counts: Sequence[int], dst: int) -> None:
        """As :meth:`all_gather`, at position ``dst`` alone."""
        self._gather(out, own, counts, dst)

    def _gather(self, out: Tensor | None, own: Tensor, counts: Sequence[int], dst: int | None) -> None:
        boxes, me = self._boxes, self._boxes.position
        room = HALF_BYTES // own.element_size()
        for low in range(0, max(counts), room):
            if dst == me:
                operation = boxes.join()
            else:
                operation = boxes.begin()
                mine = own[low : low + room]
                boxes.half(me, operation, own.dtype)[: len(mine)] = mine
                boxes.publish(operation)
            if out is None:
                continue
            start = low
            for position, count in enumerate(counts):
                end = start + min(count - low, room)
                if position == me:
                    out[start:end] = own[low : low + room]
                elif end > start:
                    boxes.wait_for(position, operation)
                    out[start:end] = boxes.half(position, operation, own.dtype)[: end - start]
                start += count

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """``tensor`` becomes that of position ``src``."""
        boxes = self._boxes
        room = HALF_BYTES // tensor.element_size()
        for low in range(0, len(tensor), room):
            part = tensor[low : low + room]
            if src == boxes.position:
                operation = boxes.begin()
                boxes.half(src, operation, tensor.dtype)[: len(part)] = part
                boxes.publish(operation)
            else:
                operation = boxes.join()
                boxes.wait_for(src, operation)
                part.copy_(boxes.half(src, operation, tensor.dtype)[: len(part)])

    def all_reduce(self, out: Tensor, tensor: Tensor) -> None:
        """``out`` becomes the sum of every rank's ``tensor``, added in rank order."""
        if self._size > 2 and tensor.nbytes >= SPLIT_SUM_BYTES:
            counts = even_counts(len(tensor), self._size)
            share = torch.empty(counts[self._boxes.position], dtype=tensor.dtype)
            self.reduce_scatter(share, tensor, counts)
            self.all_gather(out, share, counts)
            return
        boxes, me = self._boxes, self._boxes.position
        room = HALF_BYTES // tensor.element_size()
        for low in range(0, len(tensor), room):
            operation = boxes.begin()
            mine = tensor[low : low + room]
            length = len(mine)
            boxes.half(me, operation, tensor.dtype)[:length] = mine
            boxes.publish(operation)
            parts = []
            for position in range(self._size):
                boxes.wait_for(position, operation)
                parts.append(mine if position == me else boxes.half(position, operation, tensor.dtype)[:length])
            add_in_order(parts, out[low : low + length])

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int]) -> None:
        """``tensor`` (sum(counts),) is a segment for each rank; ``out`` becomes the sum of those for this one.

        Every half is divided evenly among the readers, so that all of them have something to add up in every round.
        """
        boxes, me = self._boxes, self._boxes.position
        room = HALF_BYTES // tensor.element_size() // self._size
        segments = tensor.split_with_sizes(list(counts))
        for low in range(0, max(counts), room):
            operation = boxes.begin()
            self._write_slots(operation, segments, low, room)
            boxes.publish(operation)
            length = min(counts[me] - low, room)
            if length <= 0:
                continue
            parts = []
            for position in range(self._size):
                boxes.wait_for(position, operation)
                slot = boxes.half(position, operation, tensor.dtype)[me * room : me * room + length]
                parts.append(segments[me][low : low + length] if position == me else slot)
            add_in_order(parts, out[low : low + length])

    def all_to_all(
        self, output: Tensor, source: Tensor, output_splits: Sequence[int], source_splits: Sequence[int]
    ) -> None:
        """Segment r of ``source`` goes to position r, segment r of ``output`` comes from there."""
        boxes, me = self._boxes, self._boxes.position
        room = HALF_BYTES // source.element_size() // self._size
        segments, places = source.split_with_sizes(list(source_splits)), output.split_with_sizes(list(output_splits))
        places[me].copy_(segments[me])
        rounds = own_rounds = max(1, -(-max(source_splits) // room))
        number = 0
        while number < rounds:
            operation, low = boxes.begin(), number * room
            self._write_slots(operation, segments, low, room)
            if number == 0:
                boxes.bounds(me, operation)[0] = own_rounds
            boxes.publish(operation)
            for position, place in enumerate(places):
                if position == me:
                    continue
                boxes.wait_for(position, operation)
                if number == 0:
                    rounds = max(rounds, int(boxes.bounds(position, operation)[0]))
                length = min(len(place) - low, room)
                if length > 0:
                    slot = boxes.half(position, operation, source.dtype)[me * room : me * room + length]
                    place[low : low + length] = slot
            number += 1

    def _write_slots(self, operation: int, segments: Sequence[Tensor], low: int, room: int) -> None:
        me = self._boxes.position
        half = self._boxes.half(me, operation, segments[0].dtype)
        for position, segment in enumerate(segments):
            part = segment[low : low + room]
            if position != me and len(part):
                half[position * room : position * room + len(part)] = part

    def barrier(self, timeout_s: float) -> None:
        """Return when all ranks have called this. The GroupTimeout after ``timeout_s`` names those that have not."""
        operation = self._boxes.join()
        self._boxes.wait_for_all(operation, timeout_s)
