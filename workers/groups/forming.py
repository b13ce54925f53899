"""How the ranks of a group meet on the epoch's store and make what they talk over."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not in __all__

from drumline.protocol.stateless import StatelessGroup, connect_store, group_prefix
from drumline.workers.groups.mailboxes import Mailboxes
from drumline.workers.groups.place import GroupPlace
from drumline.workers.groups.sharing import share_memory
from drumline.workers.groups.watch import Watch

# Beyond the deadline of the group's own waits, which come first.
_SOCKET_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Formed:
    """What the ranks of a group of several have between them.

    ``mailboxes``: the memory that all of them share, or None; then gloo's process group is in ``gloo`` or, while it has
    not been needed, made by ``connect``, on all ranks at once. ``sees[i][j]``: whether rank i reaches the memory of
    rank j, by position. ``nccl``: the process group of the devices, or None. ``meet``: a barrier on the store, until
    ``closed`` is set.
    """

    mailboxes: Mailboxes | None
    sees: list[list[bool]]
    gloo: Any
    connect: Callable[[], Any]
    nccl: Any
    meet: Callable[[float], None]
    closed: threading.Event


def meet(watch: Watch, deadline_s: float, abandoned: threading.Event, *, connect: bool, share: bool) -> Formed:
    """Meet the other ranks; blocks for ``deadline_s`` at most. See :func:`drumline.workers.groups.form_group`."""
    place = watch.place
    end = time.monotonic() + deadline_s
    store = connect_store(place.store_host, place.store_port, deadline_s, abandoned)
    # Connecting tells nobody who is missing; a barrier before it does.
    meeting = StatelessGroup(store, place.term, place.epoch, watch.name, place.rank, place.members, abandoned)
    meeting.barrier(max(0.0, end - time.monotonic()))
    mailboxes, sees = share_memory(meeting, max(0.0, end - time.monotonic()), watch, share)
    prefix = group_prefix(place.term, place.epoch, watch.name)

    def connect_sockets() -> Any:
        return _connect_gloo(PrefixStore(f"{prefix}/gloo", store), place, watch.deadline_s)

    gloo = connect_sockets() if connect and mailboxes is None else None
    nccl = None
    if place.device.type == "cuda":
        nccl = _connect_nccl(PrefixStore(f"{prefix}/nccl", store), place, watch.deadline_s)
    closed = threading.Event()
    later = StatelessGroup(store, place.term, place.epoch, f"{watch.name}/later", place.rank, place.members, closed)
    return Formed(mailboxes, sees, gloo, connect_sockets, nccl, later.barrier, closed)


def _connect_gloo(store: PrefixStore, place: GroupPlace, deadline_s: float) -> Any:
    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    # Left to itself gloo listens on whatever the host's name resolves to.
    address = own_address(place.store_host, place.store_port)
    options._devices = [gloo.create_device(hostname=address, lazy_init=False)]
    options._timeout = timedelta(seconds=deadline_s + _SOCKET_GRACE_S)
    options._threads = 2
    return gloo(store, place.position, place.size, options)


def _connect_nccl(store: PrefixStore, place: GroupPlace, deadline_s: float) -> Any:
    # Read when the group is made. Without it the wait for an operation that has failed returns as if all were well, and
    # torch's own watchdog ends the process at the first error of a peer. Waits block nobody: see ``poll_slice``.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    nccl: Any = distributed.ProcessGroupNCCL
    torch.cuda.set_device(place.device)
    options = nccl.Options()
    options._timeout = timedelta(seconds=deadline_s + _SOCKET_GRACE_S)
    group = nccl(store, place.position, place.size, options)
    group.eager_connect_single_device(place.device)
    return group


def own_address(host: str, port: int) -> str:
    """The address of this host on its way to ``host``: what peers there can reach. Sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
