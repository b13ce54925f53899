"""Nothing about a request leaves the coordinator before the transaction that holds it has committed."""

from __future__ import annotations

from drumline.protocol.messages import Accepted, Finished, Resumed, ToClient, Tokens
from tests.simulation.cluster.disk import Disk, Kept
from tests.simulation.worker import RuleBrokenError


class DeliveryRules:
    """Holds every message to a client against what is on disk. Requests that were forgotten since are left out."""

    def __init__(self) -> None:
        self._streams: dict[tuple[bytes, int], tuple[str, int]] = {}

    def check(self, disk: Disk | None, identity: bytes, message: ToClient) -> None:
        """``message`` goes to the connection of ``identity`` now. ``disk`` None: nothing is kept at the moment."""
        if isinstance(message, Accepted | Resumed):
            for index, handle in enumerate(message.handles.tolist()):
                self._streams[identity, handle] = (message.request_id, index)
        if disk is not None:
            self._check(disk, identity, message)

    def _check(self, disk: Disk, identity: bytes, message: ToClient) -> None:
        if isinstance(message, Accepted | Resumed) and message.request_id not in disk.ever:
            raise RuleBrokenError(f"{message.request_id}: {message} is sent before it is journalled")
        if isinstance(message, Resumed):
            kept = disk.requests.get(message.request_id)
            for index, tokens in enumerate(message.tokens if kept is not None else ()):
                self._there(kept, index, len(tokens) - 1)
        elif isinstance(message, Tokens):
            for handle, position in zip(message.handles.tolist(), message.positions.tolist(), strict=True):
                found = self._streams.get((identity, handle))
                if found is None:
                    raise RuleBrokenError(f"tokens of stream {handle} go to {identity!r}, which was not told of it")
                self._there(disk.requests.get(found[0]), found[1], position)
        elif isinstance(message, Finished):
            for end in message.ends:
                kept = disk.requests.get(end.request_id)
                if kept is not None and kept.ends[end.index] is None:
                    raise RuleBrokenError(f"{end.request_id}/{end.index}: its end is sent before it is journalled")

    def _there(self, kept: Kept | None, index: int, position: int) -> None:
        if kept is not None and kept.ends[index] is None and position >= len(kept.tokens[index]):
            request_id = kept.submit.request_id
            raise RuleBrokenError(f"{request_id}/{index}: token {position} is sent before it is journalled")
