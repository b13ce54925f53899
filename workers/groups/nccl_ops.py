"""Collectives over NCCL. Tensors are flat and contiguous, on the group's CUDA device.

Sums are NCCL's: the same bits on every rank, in an order of its own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drumline.workers.groups.pending import Pending, PendingRecv, PendingSend, make_room
from drumline.workers.groups.watch import SLICE_S, PeerLost, Watch

_POLL_S = 20e-6


class NcclOps:
    """The operations that :class:`drumline.workers.groups.GroupCoordinator` needs, over a process group of NCCL."""

    def __init__(self, group: Any, watch: Watch, position: int, size: int) -> None:
        self.pending: Any = None
        self.group = group
        self._watch = watch
        self._position = position
        self._size = size
        self._sends: deque[PendingSend] = deque()

    def all_gather(self, out: Tensor, own: Tensor, counts: Sequence[int]) -> None:
        """``out`` (sum(counts),) becomes the concatenation of every rank's ``own`` (counts[position],)."""
        if all(count == counts[0] for count in counts):
            self.run(self.group._allgather_base(out, own))
        else:
            self.all_to_all(out, own.repeat(self._size), counts, [len(own)] * self._size)

    def gather(self, out: Tensor | None, own: Tensor, counts: Sequence[int], dst: int) -> None:
        """As :meth:`all_gather`, at position ``dst`` alone."""
        to_dst = [0] * self._size
        to_dst[dst] = len(own)
        received = [0] * self._size if out is None else counts
        self.all_to_all(own.new_empty(0) if out is None else out, own, received, to_dst)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """``tensor`` becomes that of position ``src``."""
        self.run(self.group.broadcast(tensor, src))

    def all_reduce(self, out: Tensor, tensor: Tensor) -> None:
        """``out`` becomes the sum of every rank's ``tensor``."""
        out.copy_(tensor)
        self.run(self.group.allreduce([out]))

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int]) -> None:
        """``tensor`` (sum(counts),) is a segment for each rank; ``out`` becomes the sum of those for this one."""
        if all(count == counts[0] for count in counts):
            self.run(self.group._reduce_scatter_base(out, tensor))
        else:
            total = tensor.clone()
            self.run(self.group.allreduce([total]))
            start = sum(counts[: self._position])
            out.copy_(total[start : start + len(out)])

    def all_to_all(
        self, output: Tensor, source: Tensor, output_splits: Sequence[int], source_splits: Sequence[int]
    ) -> None:
        """Segment r of ``source`` goes to position r, segment r of ``output`` comes from there."""
        self.run(self.group.alltoall_base(output, source, list(output_splits), list(source_splits)))

    def isend(self, data: Tensor, dst: int) -> PendingSend:
        """Start to send a flat tensor to position ``dst``."""
        make_room(self._sends)
        pending = NcclSend(self.group.send([data], dst, 0), data, dst, self._watch)
        self._sends.append(pending)
        return pending

    def irecv(self, data: Tensor, src: int) -> PendingRecv:
        """Start to receive a flat tensor from position ``src``."""
        pending = NcclRecv(self.group.recv([data], src, 0), data, src, self._watch)
        pending.result = data
        return pending

    def close(self) -> None:
        """Give the communicator up, with all that is under way. Never blocks."""
        remains = [self.group, self.pending, *self._sends]
        self.group = self.pending = None
        self._sends.clear()
        threading.Thread(target=_bury, args=(remains,), name=f"drop-{self._watch.name}", daemon=True).start()

    def run(self, work: Any) -> None:
        """Return when ``work`` is done on the device. Errors: EpochAborted, PeerLost, GroupTimeout."""
        self.pending = work
        del work  # no frame of an exception may hold on to it
        waited = 0.0
        while (failure := poll_slice(self.pending)) is not None:
            if failure:
                raise self._watch.error(PeerLost, failure, self._watch.others())
            self._watch.check()
            waited += SLICE_S
            self._watch.check_deadline(waited, self._watch.others())
        self.pending = None


class _Polled(Pending):
    """A message of NCCL, whose end the main thread itself can look for; keeps its buffer alive until then."""

    def __init__(self, work: Any, data: Tensor, peer: int, watch: Watch) -> None:
        super().__init__(watch, peer)
        self._work = work
        self._data = data

    @property
    def done(self) -> bool:
        """Whether the message is through, or has failed."""
        return bool(self._work.is_completed())

    def look(self, slice_s: float) -> bool:
        """Whether the message is through within ``slice_s``. Raises PeerLost when it has failed."""
        failure = poll_slice(self._work, slice_s)
        if failure:
            raise self._watch.error(PeerLost, failure, [self._peer])
        return failure is None


class NcclSend(_Polled, PendingSend):
    """See :class:`PendingSend`."""


class NcclRecv(_Polled, PendingRecv):
    """See :class:`PendingRecv`."""


def _bury(remains: list[Any]) -> None:
    remains[0].abort()
    remains.clear()


def poll_slice(work: Any, slice_s: float = SLICE_S) -> str | None:
    """None when ``work`` is done, "" when ``slice_s`` have passed and it is not, else why it failed.

    A host that blocks in NCCL's own wait cannot look at the abort flag. An operation that has failed is completed too:
    only the wait tells, which orders the streams and, with ``TORCH_NCCL_BLOCKING_WAIT``, raises.
    """
    end = time.monotonic() + slice_s
    while not work.is_completed():
        if time.monotonic() >= end:
            return ""
        time.sleep(_POLL_S)
    try:
        work.wait()
    except RuntimeError as error:
        return str(error)
    return None
