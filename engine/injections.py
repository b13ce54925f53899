"""Faults that ranks are to bring upon themselves, until they have: also those of processes still to be started."""

from __future__ import annotations

import msgspec

from drumline.protocol.fault_names import TAKEN_BACK
from drumline.protocol.messages import Inject, Injected, Injection, ToWorker, WelcomeWorker


class Injections:
    """By number. A rank is told its own with its Welcome and whenever they change; one that says Injected has had
    it."""

    def __init__(self) -> None:
        self._pending: dict[int, Injection] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, injections: tuple[Injection, ...]) -> None:
        """More of them; one with the number of another takes its place, or, of kind ``none``, takes it back."""
        for one in injections:
            if one.kind == TAKEN_BACK:
                self._pending.pop(one.number, None)
            else:
                self._pending[one.number] = one

    def clear(self) -> None:
        """Forget those that have not come to pass."""
        self._pending.clear()

    def seen(self, message: Injected) -> None:
        """A rank says that one happens now."""
        self._pending.pop(message.number, None)

    def of(self, rank: int) -> tuple[Injection, ...]:
        """What ``rank`` has yet to do."""
        return tuple(one for one in self._pending.values() if one.rank == rank)

    def order(self, rank: int, term: int) -> Inject:
        """The message that says so."""
        return Inject(term, self.of(rank))

    def into(self, rank: int, message: ToWorker) -> ToWorker:
        """``message``, a Welcome with what the new process is to do."""
        if isinstance(message, WelcomeWorker) and (own := self.of(rank)):
            return msgspec.structs.replace(message, injections=own)
        return message
