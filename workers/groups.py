"""The tensor groups of an epoch.

Each group is a process group of its own on the epoch's store; torch's global default group is never made. A wait for a
collective is cut into slices, because a blocked one cannot be interrupted: between two slices the main thread looks at
the abort flag and may walk away. What it leaves behind, group and buffers, belongs to the epoch and is dropped on
another thread, since the last reference to a group with a pending operation blocks until the peer is gone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not in __all__

from drumline.protocol.errors import DrumlineError, ErrorInfo, ProtocolError
from drumline.protocol.stateless import StatelessGroup, connect_store, group_prefix
from drumline.workers.abort import AbortFlag, EpochAborted
from drumline.workers.mailboxes import Mailboxes, open_mailboxes
from drumline.workers.progress import Progress

T = TypeVar("T")

SLICE_S = 0.05
COLLECTIVE_DEADLINE_S = 120.0
FORM_DEADLINE_S = 60.0
_SLICE = timedelta(seconds=SLICE_S)
_NCCL_POLL_S = 20e-6
_GRACE_S = 2.0


class PeerLost(DrumlineError):
    """A collective failed: the connection to another rank broke. The coordinator knows which process is to blame."""

    kind = "peer_lost"
    retryable = True


class GroupTimeout(DrumlineError):
    """A collective, or the forming of a group, did not end within its deadline."""

    kind = "group_timeout"
    retryable = True


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Where this rank stands in an epoch's group, and how the group meets.

    ``members``: the global ranks of the group in order, ``rank`` one of them. ``store_host`` and ``store_port`` lead to
    the epoch's TCPStore.
    """

    term: int
    epoch: int
    rank: int
    members: tuple[int, ...]
    store_host: str
    store_port: int
    device: torch.device

    @property
    def position(self) -> int:
        """The index of this rank among the members: its rank within the group."""
        return self.members.index(self.rank)

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return len(self.members)


@dataclass(frozen=True, slots=True)
class Formed:
    """The memory that the ranks share where they can, and the process group of torch: ``group`` or, while it has not
    been needed, None; ``connect`` makes it, on all ranks at once."""

    group: Any
    mailboxes: Mailboxes | None
    connect: Callable[[], Any]


class GroupCoordinator:
    """One process group, its collectives, their deadlines. Used by the main thread alone.

    Where ranks share memory, sockets are connected at the first collective that goes over them: gloo's thread wakes a
    hundred times a second from then on, in an idle engine too.

    Errors of every collective: EpochAborted, PeerLost, GroupTimeout. After any of them the group is of no use and
    :meth:`close` must be called.
    """

    def __init__(self, name: str, formed: Formed, place: GroupPlace, abort: AbortFlag, progress: Progress) -> None:
        self.name = name
        self.mailboxes = formed.mailboxes
        self.position = place.position
        self.size = place.size
        self.device = place.device
        self._group = formed.group
        self._connect = formed.connect
        self._closed = False
        self._place = place
        self._abort = abort
        self._progress = progress
        self._pending: Any = None

    def all_to_all(self, output: Tensor, source: Tensor, output_splits: list[int], source_splits: list[int]) -> None:
        """Send ``source_splits[r]`` rows of ``source`` to each rank r, receive ``output_splits[r]`` rows from it.

        Both tensors are contiguous, of one dtype and row width; splits may be 0. Blocks until the rows are there.
        """
        with self.collective():
            if self._group is None:
                self._group = _aside(self._connect, self.name, self._place, self._abort, FORM_DEADLINE_S)
            self._pending = self._group.alltoall_base(output, source, output_splits, source_splits)
            self._wait()

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Around anything that waits for other ranks: keeps the progress record, refuses an epoch that is over."""
        self.check_epoch()
        self._progress.enter_collective()
        try:
            yield
        finally:
            self._progress.leave_collective()

    def check_epoch(self) -> None:
        """Raises EpochAborted when the epoch is over or the group is closed."""
        self._abort.check(self._place.term, self._place.epoch)
        if self._closed:
            raise EpochAborted(f"group {self.name} of epoch {self._place.epoch} is closed")

    def check_counts(self, counts: Sequence[int], own: int) -> None:
        """Raises ProtocolError when a step's token counts do not fit the group, of which this rank has ``own``."""
        if len(counts) != self.size or counts[self.position] != own:
            raise ProtocolError(
                f"rank {self.position} of {self.size} brings {own} tokens; the step's counts are {list(counts)}"
            )

    def error(self, kind: type[DrumlineError], text: str) -> DrumlineError:
        """An error of the collective that this rank is in."""
        step, collective = self._progress.position[2:4]
        text = f"group {self.name}, rank {self.position} of {self.size}, collective {collective} of step {step}: {text}"
        info = ErrorInfo(kind=kind.kind, text=text, retryable=True, epoch=self._place.epoch, step=step)
        return kind(text, info)

    def close(self) -> None:
        """Give the group up. Never blocks, whatever is pending."""
        if self._closed:
            return
        self._closed = True
        remains = [self._pending, self._group]
        self._pending = self._group = None
        if self.mailboxes is not None:
            self.mailboxes.leave()
        if remains[1] is None:
            return
        if self.device.type == "cuda":
            remains.insert(0, remains[1].abort)
        threading.Thread(target=_bury, args=(remains,), name=f"drop-{self.name}", daemon=True).start()

    def _wait(self) -> None:
        # Slices are counted, not clocked: time in which this process was itself stopped must not count against a peer.
        waited = 0.0
        while (failure := self._wait_slice()) is not None:
            if failure:
                raise self.error(PeerLost, failure)
            self._abort.check(self._place.term, self._place.epoch)
            waited += SLICE_S
            if waited >= COLLECTIVE_DEADLINE_S:
                raise self.error(GroupTimeout, f"did not end within {COLLECTIVE_DEADLINE_S:.0f} s")
        self._pending = None

    def _wait_slice(self) -> str | None:
        """None when the pending operation is done, "" when it is still pending, else why it failed.

        No frame of an exception may hold on to the operation: the last reference to it must be the burying thread's.
        """
        work = self._pending
        if self.device.type == "cuda":
            return self._poll_slice(work)
        try:
            work.wait(_SLICE)
        except RuntimeError as error:
            if not work.is_completed():
                return ""
            text = str(error)
        else:
            return None
        # It ended between the two lines above, well or badly; the wait no longer blocks and says which.
        try:
            work.wait()
        except RuntimeError as error:
            text = str(error) or text
            return text.partition(". This is typically caused")[0]
        return None

    def _poll_slice(self, work: Any) -> str | None:
        # NCCL's own wait only orders streams, and a host that blocks on the stream cannot look at the abort flag.
        end = time.monotonic() + SLICE_S
        while time.monotonic() < end:
            if work.is_completed():
                try:
                    work.wait()
                except RuntimeError as error:
                    return str(error)
                return None
            time.sleep(_NCCL_POLL_S)
        return ""


def form_group(
    name: str, place: GroupPlace, abort: AbortFlag, progress: Progress, deadline_s: float = FORM_DEADLINE_S
) -> GroupCoordinator:
    """Meet the other ranks on the epoch's store and connect to all of them.

    It runs on a side thread, so that a newer epoch, or the end of the process, can abandon it.

    Raises:
        EpochAborted: the epoch ended meanwhile.
        StoreError: a rank did not come to the store within ``deadline_s``, or the store went away; names the ranks.
        GroupTimeout: all came, and the connections were not made in time.
        PeerLost: a rank went away while the connections were made.
    """
    abandoned = threading.Event()
    try:
        formed = _aside(lambda: _meet(name, place, deadline_s, abandoned), name, place, abort, deadline_s)
    finally:
        abandoned.set()
    return GroupCoordinator(name, formed, place, abort, progress)


def _aside(work: Callable[[], T], name: str, place: GroupPlace, abort: AbortFlag, deadline_s: float) -> T:
    """What ``work`` returns, run on a thread that is left behind when the epoch ends or the deadline passes."""
    results: list[T] = []
    errors: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # carried to the main thread, which raises it
            errors.append(error)
        done.set()

    threading.Thread(target=run, name=f"form-{name}", daemon=True).start()
    deadline = time.monotonic() + deadline_s + _GRACE_S
    while not done.wait(SLICE_S):
        abort.check(place.term, place.epoch)
        if time.monotonic() > deadline:
            raise GroupTimeout(f"group {name} of epoch {place.epoch} was not formed within {deadline_s:g} s")
    if results:
        return results[0]
    if isinstance(errors[0], DrumlineError):
        raise errors[0]
    raise PeerLost(f"group {name} of epoch {place.epoch} could not be formed: {errors[0]}") from errors[0]


def _meet(name: str, place: GroupPlace, deadline_s: float, abandoned: threading.Event) -> Formed:
    end = time.monotonic() + deadline_s
    store = connect_store(place.store_host, place.store_port, deadline_s, abandoned)
    # Connecting tells nobody who is missing; a barrier before it does.
    meeting = StatelessGroup(store, place.term, place.epoch, name, place.rank, place.members, abandoned)
    meeting.barrier(max(0.0, end - time.monotonic()))
    prefixed = PrefixStore(group_prefix(place.term, place.epoch, name), store)
    if place.device.type == "cuda":
        return Formed(_connect_nccl(prefixed, place), None, lambda: _connect_nccl(prefixed, place))
    mailboxes = open_mailboxes(meeting, max(0.0, end - time.monotonic()), SLICE_S)
    group = _connect_gloo(prefixed, place) if mailboxes is None else None
    return Formed(group, mailboxes, lambda: _connect_gloo(prefixed, place))


def _connect_gloo(store: PrefixStore, place: GroupPlace) -> Any:
    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    # Left to itself gloo listens on whatever the host's name resolves to.
    address = own_address(place.store_host, place.store_port)
    options._devices = [gloo.create_device(hostname=address, lazy_init=False)]
    options._timeout = timedelta(seconds=COLLECTIVE_DEADLINE_S + 30)
    options._threads = 2
    return gloo(store, place.position, place.size, options)


def _connect_nccl(store: PrefixStore, place: GroupPlace) -> Any:
    nccl: Any = distributed.ProcessGroupNCCL
    torch.cuda.set_device(place.device)
    options = nccl.Options()
    options._timeout = timedelta(seconds=COLLECTIVE_DEADLINE_S + 30)
    group = nccl(store, place.position, place.size, options)
    group.eager_connect_single_device(place.device)
    return group


def own_address(host: str, port: int) -> str:
    """The address of this host on its way to ``host``: what peers there can reach. Sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _bury(remains: list[Any]) -> None:
    first = remains[0]
    if callable(first):
        first()
    del first
    remains.clear()
