"""One layer that is to get other experts, on one rank, from the order to the last expert in its slot."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import I32, StageExperts
from drumline.workers.experts.expert_layer import EMPTY, ExpertLayer, ExpertWeights, canary_of
from drumline.workers.experts.moves import Move
from drumline.workers.experts.parts import CANARY_BYTES, cut_part, expert_bytes, part_size, put_part
from drumline.workers.experts.staging_pool import StagingPool
from drumline.workers.groups.coordinator import GroupCoordinator
from drumline.workers.groups.pending import PendingRecv, PendingSend


@dataclass(slots=True)
class _Coming:
    """A part that is expected from rank ``source``, for the expert in ``buffer``."""

    pending: PendingRecv
    source: int
    buffer: int
    part: int


class StagedLayer:
    """``rounds``: the moves of each round, this rank's and those of others. ``wanted``: int32 (slots,), what this
    rank's slots are to hold. Raises ProtocolError, before anything is changed, for an order that the layer does not
    fit."""

    def __init__(
        self,
        message: StageExperts,
        rounds: tuple[tuple[Move, ...], ...],
        wanted: I32,
        layer: ExpertLayer,
        me: int,
        pool: StagingPool,
    ) -> None:
        self.generation = message.generation
        self.layer = layer
        self.committed = False
        self.dropping = False
        self.told = False
        self.bytes_received = 0
        self.started_at = time.monotonic()
        self._parts = message.parts
        self._rounds = rounds
        self._wanted = wanted
        self._held_before: I32 = layer.held.copy()
        self._me = me
        self._pool = pool
        self._next = 0
        self._next_home = 0
        self._home: set[int] = set()
        #: Moves whose part is still to be sent. It is cut when it goes: copies that wait would fill the memory.
        self._outgoing: deque[tuple[Move, int]] = deque()
        self._sends: list[PendingSend] = []
        self._coming: list[_Coming] = []
        arriving = [move for moves in rounds for move in moves if move.target == me]
        self._check(message, arriving)
        #: The slot that the expert in each buffer is for, and how many of its parts are in the buffer.
        self._slots = [move.slot for move in arriving]
        self._arrived_parts = [0] * len(arriving)
        self._buffers = {slot: buffer for buffer, slot in enumerate(self._slots)}

    def _check(self, message: StageExperts, arriving: list[Move]) -> None:
        layer, name = self.layer, f"generation {message.generation} of MoE layer {self.layer.number}"
        most = expert_bytes(self._pool.buffer(0)) if self._pool.size else 1
        if not 1 <= message.parts <= most or message.generation <= layer.generation:
            valid = f"1 to {most}, and a generation after {layer.generation}"
            raise ProtocolError(f"{name} in {message.parts} parts; valid: {valid}")
        slots = {move.slot for move in arriving}
        if len(slots) < len(arriving) or len(arriving) > self._pool.size:
            found = f"{len(arriving)} experts come to {len(slots)} slots"
            raise ProtocolError(f"{name}: {found}; valid: one to each, {self._pool.size} at most")
        kept = [slot for slot in range(layer.num_slots) if slot not in slots]
        if len(self._wanted) != layer.num_slots or (self._wanted[kept] != layer.held[kept]).any():
            raise ProtocolError(
                f"{name} wants {self._wanted.tolist()}; {layer.held.tolist()} and its moves do not make it"
            )
        for moves in self._rounds:
            for move in moves:
                mine = move.source == self._me
                if mine and not (move.source_slot < layer.num_slots and layer.holds(move.source_slot, move.expert)):
                    raise ProtocolError(f"{name}: slot {move.source_slot} does not hold expert {move.expert}")

    # ------------------------------------------------------------------------------------------------------ on its way

    @property
    def _num_parts(self) -> int:
        return len(self._rounds) * self._parts

    @property
    def pending(self) -> bool:
        """Whether anything is under way."""
        return bool(self._coming or self._sends or self._outgoing)

    @property
    def whole(self) -> bool:
        """Whether all that comes is in its buffers, and all that goes is sent."""
        return self._next == self._num_parts and not self.pending

    def start(self, first: int, end: int, group: GroupCoordinator | None) -> None:
        """Start parts ``first`` to ``end``; local ones are copied at once. Raises ProtocolError unless they are
        next."""
        if first != self._next or end > self._num_parts or self.committed or self.dropping:
            found = f"parts {first} to {end} of generation {self.generation}"
            raise ProtocolError(f"{found}; valid: from {self._next}, to {self._num_parts} at most")
        self._next = end
        for number in range(first, end):
            round_number, part = divmod(number, self._parts)
            for move in self._rounds[round_number]:
                if self._me in (move.source, move.target):
                    self._start(move, part, group)

    def _start(self, move: Move, part: int, group: GroupCoordinator | None) -> None:
        if move.target == move.source:
            self._arrived(self._buffers[move.slot], part, self._cut(move, part))
            return
        if group is None:
            raise ProtocolError(f"an expert goes from rank {move.source} to rank {move.target}, and they have no group")
        if move.source == self._me:
            self._outgoing.append((move, part))
            self._send(group)
            return
        buffer = self._buffers[move.slot]
        nbytes = part_size(self._pool.buffer(buffer), self._parts, part)
        pending = group.irecv((nbytes,), torch.uint8, move.source)
        self._coming.append(_Coming(pending, move.source, buffer, part))

    def _cut(self, move: Move, part: int) -> Tensor:
        """What stands in a slot changes only once all has been sent."""
        slot = move.source_slot
        return cut_part(self.layer.weights(slot), self._parts, part, int(self.layer.canary[slot]))

    def _send(self, group: GroupCoordinator) -> None:
        # Two ranks that each wait until the other one reads would wait for good: what finds no room waits here.
        while self._outgoing and group.has_room(self._outgoing[0][0].target):
            move, part = self._outgoing.popleft()
            self._sends.append(group.isend(self._cut(move, part), move.target))

    def poll(self, group: GroupCoordinator | None) -> None:
        """Send what has found no room yet, take in what has come; waits for nobody. Raises ProtocolError for an expert
        that is not the one expected, and PeerLost, EpochAborted."""
        if group is not None:
            self._send(group)
        self._sends = [send for send in self._sends if not send.look(0.0)]
        left: list[_Coming] = []
        late: set[int] = set()
        for one in self._coming:
            # Messages of one rank come in order: behind one that is not there nothing is.
            if one.source in late or not one.pending.look(0.0):
                late.add(one.source)
                left.append(one)
                continue
            message = one.pending.result
            self.bytes_received += message.nbytes - (CANARY_BYTES if one.part == self._parts - 1 else 0)
            self._arrived(one.buffer, one.part, message)
        self._coming = left

    def _arrived(self, buffer: int, part: int, message: Tensor) -> None:
        if part != self._arrived_parts[buffer]:
            raise ProtocolError(f"part {part} came where part {self._arrived_parts[buffer]} was expected")
        canary = put_part(self._pool.buffer(buffer), self._parts, part, message)
        if canary is not None:
            expected = self._expected(buffer)
            if canary != expected:
                where = f"slot {self._slots[buffer]} of MoE layer {self.layer.number}"
                raise ProtocolError(f"canary {canary} came for {where}; expected {expected}")
            self._pool.canary[buffer] = canary
        self._arrived_parts[buffer] += 1

    def _expected(self, buffer: int) -> int:
        return canary_of(self.layer.number, int(self._wanted[self._slots[buffer]]))

    # --------------------------------------------------------------------------------------------------------- commit

    def commit(self) -> None:
        """The slots compute with the new experts from here on. Raises ProtocolError unless all of them are there."""
        if not self.whole or self.committed or self.dropping:
            raise ProtocolError(f"generation {self.generation} is to be committed and is not whole")
        layer = self.layer
        for buffer, slot in enumerate(self._slots):
            layer.moe.experts.use(slot, *self._pool.buffer(buffer))
            layer.moe.experts.load[slot] = 0
            layer.held[slot] = self._wanted[slot]
            layer.canary[slot] = self._pool.canary[buffer]
        layer.generation = self.generation
        self.committed = True

    def go_home(self, first: int, end: int) -> bool:
        """Copy what came in rounds ``first`` to ``end`` into the slots' own memory. Whether that was all. Raises
        ProtocolError unless the layer is committed and they are next."""
        if not self.committed or first != self._next_home or end > len(self._rounds):
            raise ProtocolError(f"rounds {first} to {end} of generation {self.generation} are not to go home now")
        self._next_home = end
        for moves in self._rounds[first:end]:
            for move in moves:
                if move.target == self._me:
                    self._bring_home(move.slot)
        return end == len(self._rounds)

    def _bring_home(self, slot: int) -> None:
        layer = self.layer
        for target, source in zip(layer.row(slot), layer.weights(slot), strict=True):
            target.copy_(source)
        layer.moe.experts.use(slot, *layer.row(slot))
        self._home.add(slot)

    def settle(self) -> None:
        """All that is committed goes home at once."""
        if self.committed:
            for slot in self._slots:
                if slot not in self._home:
                    self._bring_home(slot)

    # ---------------------------------------------------------------------------------------------------------- spare

    def spares(self) -> list[tuple[int, ExpertWeights]]:
        """Whole experts outside of the slots, and their memory, in an order that stays: before the commit those that
        have come, after it what stood in the slots before."""
        found: list[tuple[int, ExpertWeights]] = []
        for buffer, slot in enumerate(self._slots):
            if not self.committed:
                if self._arrived_parts[buffer] == self._parts:
                    found.append((int(self._wanted[slot]), self._pool.buffer(buffer)))
            elif slot not in self._home and self._held_before[slot] != EMPTY:
                found.append((int(self._held_before[slot]), self.layer.row(slot)))
        return found
