"""Which request kills ranks: suspects are halved until one is left; no I/O.

Only deaths from inside count. The suspects of a death are the requests of the steps that had not been acknowledged. At
the second death that a request is a suspect of, all such requests are split in halves; one half at a time runs on a
replica of its own. A half that kills again is split again; the one that kills alone is the one. A half that has come
past the place where it would have killed is innocent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

SECOND = 2
PASSED_TOKENS = 4
"""A request that has been told so many more tokens than at its confinement has passed what was in flight at the death:
up to two steps, and one for each further stage of a pipeline, whose rows compute in turn."""
MAX_COUNTED = 65536


@dataclass(frozen=True, slots=True)
class Confinement:
    """``active`` requests run apart from all others, ``held`` ones wait for their turn. Nobody: the quarantine is
    over."""

    active: tuple[str, ...] = ()
    held: tuple[str, ...] = ()


@dataclass(slots=True)
class Quarantine:
    """The suspects. ``poisoned`` counts requests found."""

    poisoned: int = 0
    _deaths: dict[str, int] = field(default_factory=dict)
    _active: dict[str, int] = field(default_factory=dict)
    _halves: list[tuple[str, ...]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self._active)

    @property
    def confinement(self) -> Confinement:
        """Who is confined now, and who waits."""
        return Confinement(tuple(self._active), tuple(one for half in self._halves for one in half))

    def died(self, suspects: Collection[str], tokens: Mapping[str, int], apart: bool = True) -> str | None:
        """A rank died from inside while ``suspects`` were in unacknowledged steps. ``tokens``: how many each request
        that has not ended was told by now. ``apart``: whether it was a rank of the replica where the active ones run
        by themselves; of a death elsewhere they are guilty only if nobody else was in those steps. Returns the request
        that is found to kill, if it is.

        Ask for :attr:`confinement` afterwards: it may have changed.
        """
        guilty = [one for one in self._active if one in suspects and one in tokens]
        if guilty and (apart or all(one in self._active for one in suspects)):
            return self._halve(guilty, tokens)
        for one in suspects:
            if one in tokens and one not in self._active:
                self._deaths[one] = self._deaths.pop(one, 0) + 1
        while len(self._deaths) > MAX_COUNTED:
            del self._deaths[next(iter(self._deaths))]
        again = [one for one in suspects if self._deaths.get(one, 0) >= SECOND]
        if self._active:
            self._wait_their_turn(again)
            return None
        if not again:
            return None
        if len(again) == 1:
            self._confine(tuple(again), tokens)
            return None
        return self._halve(again, tokens)

    def _wait_their_turn(self, requests: Collection[str]) -> None:
        """Others kill beside those that are active now: theirs is the next turn."""
        confined = {*self._active, *(one for half in self._halves for one in half)}
        more = tuple(one for one in requests if one not in confined)
        if more:
            self._halves.append(more)

    def _halve(self, guilty: list[str], tokens: Mapping[str, int]) -> str | None:
        if len(guilty) == 1 and self._active:
            found = guilty[0]
            self.poisoned += 1
            self._deaths.pop(found, None)
            self._acquit(self._active)
            self._active.clear()
            # What killed is known: the others have been in its company, no more.
            self._halves.clear()
            return found
        middle = (len(guilty) + 1) // 2
        self._halves.append(tuple(guilty[middle:]))
        self._confine(tuple(guilty[:middle]), tokens)
        return None

    def _confine(self, requests: tuple[str, ...], tokens: Mapping[str, int]) -> None:
        self._active = {one: tokens[one] for one in requests if one in tokens}

    def progressed(self, tokens: Mapping[str, int]) -> bool:
        """``tokens``: how many each live request was told by now. Whether :attr:`confinement` has changed."""
        if not self._active:
            return False
        if any(one in tokens and tokens[one] < start + PASSED_TOKENS for one, start in self._active.items()):
            return False
        self._acquit(self._active)
        self._active.clear()
        while self._halves and not self._active:
            half = tuple(one for one in self._halves.pop() if one in tokens)
            self._confine(half, tokens)
        return True

    def _acquit(self, requests: Collection[str]) -> None:
        for one in requests:
            self._deaths.pop(one, None)
