"""How many bytes of weights a rank really holds, counted on the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from drumline.workers.layers import RoutingView
from drumline.workers.models import Decoder

# Not weights: tables of positions, groups, maps of the placement, counts.
_NOT_WEIGHTS = ("rotary", "groups", "_groups", "load", "exchange", "plan", "spec", "shards")


def held_bytes(model: Decoder) -> int:
    """Bytes of all weights of ``model``, memory that several layers share counted once."""
    sizes: dict[int, int] = {}
    for tensor in _tensors(model, set()):
        if tensor.device.type == "meta":
            continue
        if tensor.is_mkldnn:  # laid out for oneDNN: its memory has no address that torch tells
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif _holds_weights(value) and id(value) not in seen:
        seen.add(id(value))
        for name, part in vars(value).items():
            if name not in _NOT_WEIGHTS:
                yield from _tensors(part, seen)


def _holds_weights(value: object) -> bool:
    return type(value).__module__.startswith("drumline.workers.") and not isinstance(value, RoutingView)
