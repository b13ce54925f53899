"""Text from token ids, one token at a time.

The text after k tokens is a function of the prompt and of those k ids alone, however they arrived: nothing here looks
at batches, frames or time. Text that has been given out is never taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so at most three of them can be waiting for the rest; a decoder shows them
# as one replacement character or as one per byte.
_MOST_WAITING = 3
# Some decoders strip the space at the start of a sequence; a few tokens of prompt in front keep it.
_PROMPT_TAIL = 6
_LONGEST_WINDOW = 24
_KEPT_OF_WINDOW = 6


class TextDecoder(Protocol):
    """The part of ``tokenizers.Tokenizer`` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``, undecodable bytes shown as replacement characters."""
        ...


class IncrementalText:
    """Decodes a growing sequence of token ids without ever giving out half a UTF-8 character.

    A window of recent tokens is decoded at each step; what lies beyond the part already given out is new, except
    trailing replacement characters, which may be bytes of a character that the next token completes.
    """

    def __init__(self, tokenizer: TextDecoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._window: list[int] = list(prompt_ids[-_PROMPT_TAIL:])
        self._fresh = len(self._window)
        self._given = self._settled(self._decode()) if self._window else 0

    def push(self, token: int) -> str:
        """The characters that ``token`` settles, often its own text, at times "" and at times more."""
        self._window.append(token)
        text = self._decode()
        settled = self._settled(text)
        new = text[self._given : settled]
        self._given = max(self._given, settled)
        if new and settled == len(text):
            # Everything is given out: the next window starts with the tokens that made this piece, for context.
            del self._window[: self._fresh]
            self._fresh = len(self._window)
            self._given = len(self._decode())
        elif len(self._window) > _LONGEST_WINDOW:
            # A run of bytes that make no characters, or of tokens without text. A character that is still incomplete
            # began within the last few tokens, as each has at least one byte of it.
            del self._window[:-_KEPT_OF_WINDOW]
            self._fresh = len(self._window) - 1
            self._given = self._settled(self._decode())
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special)

    @staticmethod
    def _settled(text: str) -> int:
        """Length of ``text`` without what the next token may still change."""
        waiting = len(text) - len(text.rstrip(REPLACEMENT))
        return len(text) - min(waiting, _MOST_WAITING)


class StopStrings:
    """Finds stop strings in growing text, across pieces, and says how much text could be the start of one.

    One Knuth-Morris-Pratt automaton per string, fed character by character, so that the match that ends first wins
    (of several that end together, the longest), and the pieces the text came in make no difference.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._links = [_failure_links(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    def feed(self, piece: str, *, armed: bool = True) -> tuple[str, int] | None:
        """The stop string that ends first within ``piece``, and how many characters of it were read; else None.

        Not ``armed``: whatever ends within this piece is passed over (fewer than min_tokens tokens).
        """
        for place, character in enumerate(piece, 1):
            matched = ""
            for which, stop in enumerate(self._stops):
                state = self._advance(which, character)
                if state == len(stop):
                    self._states[which] = self._links[which][state]
                    if len(stop) > len(matched):
                        matched = stop
            if matched and armed:
                return matched, place
        return None

    @property
    def waiting(self) -> int:
        """How many of the last characters may be the start of a stop string."""
        return max(self._states, default=0)

    def _advance(self, which: int, character: str) -> int:
        stop, links, state = self._stops[which], self._links[which], self._states[which]
        while state and stop[state] != character:
            state = links[state]
        if stop[state] == character:
            state += 1
        self._states[which] = state
        return state


def _failure_links(stop: str) -> list[int]:
    """For each length of a matched prefix, the longest shorter prefix that it ends with."""
    links = [0] * (len(stop) + 1)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = links[length]
        if stop[place] == stop[length]:
            length += 1
        links[place + 1] = length
    return links


class Detokenizer:
    """The text of one sequence, with stop strings matched and held back.

    ``text``: everything decoded and not cut off. ``settled``: how many characters of it may be given out. After a
    match nothing more is taken. ``hidden_ids`` (the tokens that end the sequence) have no text.
    """

    def __init__(
        self,
        text: IncrementalText,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        hidden_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._source = text
        self._stops = StopStrings(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._hidden_ids = frozenset() if include_stop else hidden_ids
        self._count = 0
        self.text = ""
        self.settled = 0
        self.matched: str | None = None

    def push(self, token: int) -> str | None:
        """Takes the next token. Returns the stop string that it completed, if any."""
        self._count += 1
        if self.matched is not None or token in self._hidden_ids:
            return self.matched
        piece = self._source.push(token)
        if self._stops is None:
            self.text += piece
            self.settled = len(self.text)
            return None
        match = self._stops.feed(piece, armed=self._count > self._min_tokens)
        if match is None:
            self.text += piece
            self.settled = len(self.text) if self._include_stop else len(self.text) - self._stops.waiting
            return None
        self.matched, read = match
        self.text += piece[:read]
        if not self._include_stop:
            self.text = self.text[: len(self.text) - len(self.matched)]
        self.settled = len(self.text)
        return self.matched

    def finish(self) -> None:
        """No more tokens come: text held back for a stop string that did not arrive is given out."""
        self.settled = len(self.text)
