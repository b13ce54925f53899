"""Tensors and dictionaries of tensors from one rank of a group to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.objects import decode_object, encode_object
from drumline.workers.groups import packed
from drumline.workers.groups.nccl_ops import NcclOps
from drumline.workers.groups.outboxes import Outboxes
from drumline.workers.groups.pending import PendingRecv, PendingSend
from drumline.workers.groups.sockets import Sockets
from drumline.workers.groups.watch import Watch


class Transfers:
    """The messages between two ranks of one group; ``peer`` is a position. Used by the main thread alone."""

    def __init__(self, watch: Watch, carrier: Outboxes | Sockets, nccl: NcclOps | None) -> None:
        """``carrier`` takes what is on the CPU, ``nccl`` what is on a GPU."""
        self._watch = watch
        self._carrier = carrier
        self._nccl = nccl

    def isend(self, tensor: Tensor, peer: int) -> PendingSend:
        """Start to send a tensor of any shape."""
        self._watch.check()
        flat = tensor.contiguous().view(-1)
        if tensor.is_cuda and self._nccl is not None:
            return self._nccl.isend(flat, peer)
        return self._carrier.isend(flat.view(torch.uint8), peer)

    def has_room(self, peer: int) -> bool:
        """Whether :meth:`isend` of what is on the CPU waits for nobody."""
        return self._carrier.has_room(peer)

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, device: torch.device) -> PendingRecv:
        """Post the receive of a tensor of that shape and dtype."""
        self._watch.check()
        result = torch.empty(tuple(shape), dtype=dtype, device=device)
        if result.is_cuda and self._nccl is not None:
            pending: PendingRecv = self._nccl.irecv(result.view(-1), peer)
        else:
            pending = self._carrier.irecv(result.view(-1).view(torch.uint8), peer)
        pending.result = result
        return pending

    def send_tensor_dict(self, tensors: Mapping[str, Any], peer: int) -> None:
        """Send tensors and what msgspec's msgpack carries, by name; returns when all of it may be changed again."""
        head = packed.describe(tensors)
        parts = packed.cut(encode_object(head))
        found = [tensors[one.name] for one in head.tensors]
        on_cpu = [tensor for tensor in found if not tensor.is_cuda]
        if on_cpu:
            parts.append(packed.pack(on_cpu))
        sends = [self.isend(part, peer) for part in parts if len(part)]
        sends += [self.isend(tensor, peer) for tensor in found if tensor.is_cuda and tensor.numel()]
        for send in sends:
            send.wait()

    def recv_tensor_dict(self, peer: int, device: torch.device) -> dict[str, Any]:
        """What :meth:`send_tensor_dict` sent. Tensors lie where they lay on the sender: on the CPU or on ``device``."""
        raw = self._recv_object(peer)
        head = decode_object(raw, packed.DictHead)
        on_cpu = [one for one in head.tensors if not one.cuda]
        found: dict[str, Any] = dict(head.values)
        length = packed.packed_bytes(on_cpu)
        if length:
            tensors = packed.unpack(self._recv_bytes(length, peer), on_cpu)
        else:
            tensors = packed.unpack(torch.empty(0, dtype=torch.uint8), on_cpu)
        found.update(zip((one.name for one in on_cpu), tensors, strict=True))
        waits = [
            (one.name, self.irecv(one.shape, packed.dtype_of(one), peer, device))
            for one in head.tensors
            if one.cuda and packed.size_of(one)
        ]
        found.update((name, wait.wait()) for name, wait in waits)
        for one in head.tensors:
            if one.name not in found:
                found[one.name] = torch.empty(one.shape, dtype=packed.dtype_of(one), device=device)
        if set(found) != set(head.names):
            raise ProtocolError(f"a dictionary of {head.names} brings {sorted(found)}")
        return {name: found[name] for name in head.names}

    def _recv_object(self, peer: int) -> bytes:
        head = self._recv_bytes(packed.HEAD_BYTES, peer)
        rest = packed.rest_of(head)
        return packed.join(head, self._recv_bytes(rest, peer) if rest else None)

    def _recv_bytes(self, length: int, peer: int) -> Tensor:
        return self.irecv((length,), torch.uint8, peer, torch.device("cpu")).wait()
