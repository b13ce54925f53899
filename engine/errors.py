"""The errors that an app sees. They are defined beside the messages that carry them; this is their public name."""

from drumline.protocol.errors import (
    Draining,
    DrumlineError,
    DuplicateRequest,
    EngineClosed,
    ErrorInfo,
    InvalidConfig,
    InvalidField,
    InvalidRequest,
    ProtocolError,
    QueueFull,
    RequestFailed,
    StartFailed,
    from_info,
)

__all__ = [
    "Draining",
    "DrumlineError",
    "DuplicateRequest",
    "EngineClosed",
    "ErrorInfo",
    "InvalidConfig",
    "InvalidField",
    "InvalidRequest",
    "ProtocolError",
    "QueueFull",
    "RequestFailed",
    "StartFailed",
    "from_info",
]
