"""One member's use of a store: every question under a deadline, every key deleted in the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in __all__

from drumline.protocol.bounded import Call, StoreError, poll, run_bounded
from drumline.protocol.errors import ProtocolError

R = TypeVar("R")

# What stands for "nothing there": two msgpack integers, so no encoded object is equal to it.
_ABSENT = "--"


class StoreSession:
    """The store as a member of a group sees it. :meth:`run` is for the member's thread, the rest for the operation."""

    def __init__(self, store: Store, abandoned: threading.Event | None) -> None:
        """Setting ``abandoned`` ends any wait."""
        self._open: Store | None = store
        self._abandoned = abandoned
        self._doomed: list[str] = []

    @property
    def _store(self) -> Store:
        if self._open is None:
            raise ProtocolError("an operation of a group that is closed")
        return self._open

    def close(self) -> None:
        """Drop the store, which closes it if this was its last reference in the process that serves it."""
        self._open = None

    def doom(self, keys: Iterable[str]) -> None:
        """Delete ``keys`` with the next operation."""
        self._doomed.extend(keys)

    def run(self, call: Call, ask: Callable[[Call], R], then_delete: Iterable[str] = ()) -> R:
        """Delete what is doomed, then return what ``ask`` does, within the call's deadline, and delete ``then_delete``.

        An answer counts even if the deletions do not end in time: what is left of them comes with the next operation.
        Raises StoreError when time is up, the wait is abandoned or the store is gone, and what ``ask`` raises.
        """
        store = self._store
        doomed, read = self._doomed, list(then_delete)
        deleted: set[str] = set()
        answers: list[R] = []

        def delete(keys: list[str], over: Callable[[], bool]) -> None:
            for key in keys:
                if over():
                    break
                store.delete_key(key)
                deleted.add(key)

        def operation(call: Call) -> None:
            # However short the time is: operations that fail one after the other must not fill the store.
            delete(doomed, call.stopped.is_set)
            answers.append(ask(call))
            delete(read, call.over)

        answered = False
        try:
            run_bounded(call, operation, self._abandoned)
            answered = True
        except StoreError:
            # Looked at once: the thread that was left behind may still find one, and must not have it deleted.
            answered = bool(answers)
            if not answered:
                raise
        finally:
            # What is deleted later, on such a thread, is deleted again without harm.
            self._doomed = [key for key in (doomed + read if answered else doomed) if key not in deleted]
        return answers[0]

    def set(self, key: str, raw: bytes) -> None:
        """Write; does not wait for the store."""
        self._store.set(key, raw)  # type: ignore[arg-type]  # takes bytes; its stub says str

    def peek(self, key: str) -> bytes | None:
        """What is there now, None if nothing is. ``get`` would wait for it, deaf to everything else."""
        raw = bytes(self._store.compare_set(key, _ABSENT, _ABSENT))
        return None if raw == _ABSENT.encode() else raw

    def holds(self, key: str) -> bool:
        """Whether something is there now."""
        return self._store.check([key])

    def get_all(self, keys: Iterable[str]) -> list[bytes]:
        """What is under ``keys``, all of which are there."""
        return [bytes(raw) for raw in self._store.multi_get(list(keys))]

    def await_one(self, call: Call, key: str, rank: int) -> bytes:
        """What ``rank`` writes under ``key``, once it is there. Raises StoreError that names it."""
        call.unseen = (rank,)
        raw = poll(call, lambda: self.peek(key))
        if raw is None:
            raise call.late()
        return raw

    def await_all(self, call: Call, keys: Mapping[int, str]) -> None:
        """Return when all ``keys``, by the ranks that write them, are there. Raises StoreError that names the missing.

        Store.wait would do, but cannot be abandoned and logs every timeout.
        """
        missing = dict(keys)

        def look() -> bool | None:
            if not missing or self._store.check(list(missing.values())):
                return True
            if call.look_due():
                self._strike_out(call, missing)
            return None

        call.unseen = tuple(missing)
        if poll(call, look):
            return
        self._strike_out(call, missing)
        if missing:
            raise call.late()

    def _strike_out(self, call: Call, missing: dict[int, str]) -> None:
        # One question per rank: too many for every turn when hundreds of ranks wait for each other.
        for rank, key in list(missing.items()):
            if self.holds(key):
                del missing[rank]
                call.unseen = tuple(missing)
