"""Typed errors, the same on every side of the wire.

A process that fails raises one of these; the codec carries its :class:`ErrorInfo`; the client library raises the same
class again. ``InvalidConfig`` and ``InvalidRequest`` are ``ValueError`` too and say which field was wrong, what was
found there and what would have been valid.
"""

from __future__ import annotations

import msgspec


class ErrorInfo(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An error as data. ``rank``, ``epoch`` and ``step`` are -1 where they do not apply."""

    kind: str
    text: str
    retryable: bool = False
    rank: int = -1
    incarnation: str = ""
    epoch: int = -1
    step: int = -1
    traceback: str = ""
    field: str = ""
    found: str = ""
    valid: str = ""


class DrumlineError(Exception):
    """Base of every error that drumline raises on purpose. Carries an :class:`ErrorInfo` in ``info``."""

    kind = "internal"
    """What went wrong; an instance says what its ``info`` says, which may be narrower than its class."""
    retryable = False
    """Whether the same again may succeed."""

    def __init__(self, text: str, info: ErrorInfo | None = None) -> None:
        super().__init__(text)
        self.info = info if info is not None else ErrorInfo(kind=self.kind, text=text, retryable=self.retryable)
        self.kind = self.info.kind
        self.retryable = self.info.retryable

    @property
    def text(self) -> str:
        """The message."""
        return self.info.text

    @property
    def rank(self) -> int:
        """The global rank at fault, or -1."""
        return self.info.rank

    @property
    def incarnation(self) -> str:
        """Which process of that rank, or empty."""
        return self.info.incarnation

    @property
    def epoch(self) -> int:
        """The epoch in which it happened, or -1."""
        return self.info.epoch

    @property
    def step(self) -> int:
        """The step in which it happened, or -1."""
        return self.info.step

    @property
    def traceback(self) -> str:
        """Where it was raised, if it came from another process; else empty."""
        return self.info.traceback


class InvalidField(DrumlineError, ValueError):
    """Input that names its field. Use one of the two subclasses."""

    kind = "invalid"

    def __init__(self, field: str, found: object, valid: str, text: str | None = None) -> None:
        shown = found if isinstance(found, str) else repr(found)
        message = text if text is not None else f"{field}: found {shown}; valid: {valid}"
        super().__init__(message, ErrorInfo(kind=self.kind, text=message, field=field, found=shown, valid=valid))
        self.field = field
        self.found = found
        self.valid = valid


class InvalidConfig(InvalidField):
    """A configuration, model folder or layout that cannot work."""

    kind = "invalid_config"


class InvalidRequest(InvalidField):
    """A request that cannot be served as it stands."""

    kind = "invalid_request"


class DuplicateRequest(DrumlineError):
    """A request id that is live already."""

    kind = "duplicate_request"


class QueueFull(DrumlineError):
    """Too many requests wait. Try again later."""

    kind = "queue_full"
    retryable = True


class Draining(DrumlineError):
    """The engine admits nothing more because it is about to stop."""

    kind = "draining"
    retryable = True


class StartFailed(DrumlineError):
    """A process could not be started, or died or failed before the engine was ready."""

    kind = "start_failed"


class RequestFailed(DrumlineError):
    """A request that ended because of a fault, not by its own terms."""

    kind = "request_failed"
    retryable = True


class EngineClosed(DrumlineError):
    """The engine is closed, or its coordinator is gone."""

    kind = "engine_closed"


class ProtocolError(DrumlineError):
    """A peer sent what the protocol does not allow, or speaks another version of it."""

    kind = "protocol"


_PLAIN: dict[str, type[DrumlineError]] = {
    cls.kind: cls
    for cls in (DuplicateRequest, QueueFull, Draining, StartFailed, RequestFailed, EngineClosed, ProtocolError)
}
_FIELDS: dict[str, type[InvalidField]] = {cls.kind: cls for cls in (InvalidConfig, InvalidRequest)}


def from_info(info: ErrorInfo) -> DrumlineError:
    """The exception that ``info`` describes; an unknown kind becomes a ``RequestFailed`` that keeps its info."""
    with_field = _FIELDS.get(info.kind)
    if with_field is not None:
        error: DrumlineError = with_field(info.field, info.found, info.valid, info.text)
        error.info = info
        return error
    return _PLAIN.get(info.kind, RequestFailed)(info.text, info)
