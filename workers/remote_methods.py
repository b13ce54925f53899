"""What may be called on a rank by name, with which arguments, and what goes back.

Callable are methods marked :func:`remote`, and the public methods that a user's worker class or extension class
defines; nothing else is. Arguments come as msgpack, are bound to the signature and decoded by each parameter's
annotation, with no conversion that msgpack does not know. All of it is checked before the method runs.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any, NoReturn, TypeVar, get_type_hints

import msgspec

from drumline.protocol.errors import DrumlineError, ErrorInfo, InvalidConfig, InvalidRequest
from drumline.protocol.messages import CONTROL_METHODS

MAX_RESULT_BYTES = 8 << 20
MAX_TEXT_CHARACTERS = 8_000
MAX_TRACE_CHARACTERS = 32_000
MAX_SHOWN = 100

_MARK = "__drumline_remote__"
_PLAIN = (
    "what msgpack carries: None, bool, int, float, str, bytes, datetime, lists, dicts, dataclasses and msgspec structs "
    "of them"
)
F = TypeVar("F", bound=Callable[..., Any])

_packed = msgspec.msgpack.Decoder(tuple[tuple[msgspec.Raw, ...], dict[str, msgspec.Raw]])


def remote(method: F) -> F:
    """Let ``collective_rpc`` call ``method``. Public methods that a worker or extension class defines need no mark."""
    setattr(method, _MARK, True)
    return method


class _NotCarried(Exception):
    """A value or annotation of a type that msgpack has no form for. Not a TypeError: msgspec would wrap that."""

    def __init__(self, kind: object) -> None:
        name = getattr(kind, "__qualname__", None)
        super().__init__(f"{kind.__module__}.{name}" if name else str(kind))


class RemoteMethods:
    """What may be called on ``worker``, an instance of ``base`` whose own attributes are all set.

    Raises InvalidConfig when a user's class defines a name under which ``base`` keeps an attribute of the instance:
    it would never be seen.
    """

    def __init__(self, worker: object, base: type) -> None:
        kept = vars(worker)
        for owner in _user_classes(type(worker), base):
            hidden = sorted(kept.keys() & vars(owner).keys())
            if hidden:
                field = "worker_cls" if issubclass(owner, base) else "worker_extension_cls"
                raise InvalidConfig(field, f"{_named(owner)}, which defines {', '.join(hidden)}", free_names(base))
        self._worker = worker
        self.names = callable_names(type(worker), base)
        self._methods: dict[str, _Method] = {}

    def call(self, name: str, args: bytes) -> bytes:
        """Call method ``name``. ``args``: msgpack of (positional, by name), or nothing. Returns the result as msgpack.

        Raises InvalidRequest for an unknown name, for arguments that do not fit the signature and its annotations, and
        for a result that msgpack cannot carry or of more than ``MAX_RESULT_BYTES``; whatever the method raises.
        """
        if name not in self.names:
            raise InvalidRequest("method", name, ", ".join((*CONTROL_METHODS, *self.names)))
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = _Method(name, getattr(self._worker, name))
        return _encoded(method(args), name)


class _Method:
    """One bound method with its signature. Decoders are made when first needed."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidRequest("method", f"{name}, a coroutine function", "a plain method: a rank runs no event loop")
        self._name = name
        self._function = function
        self._signature = inspect.signature(function)
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {}

    def __call__(self, args: bytes) -> Any:
        positional, by_name = self._unpacked(args)
        try:
            bound = self._signature.bind(*positional, **by_name)
        except TypeError as error:
            quoted = re.search(r"'(\w+)'", str(error))
            text = f"{error}; valid: {self._shown}"
            field = quoted.group(1) if quoted else "args"
            raise InvalidRequest(field, str(error), self._shown, f"{self._name}: {text}") from None
        for name, value in bound.arguments.items():
            parameter = self._signature.parameters[name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(self._decoded(parameter, one) for one in value)
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self._decoded(parameter, one) for key, one in value.items()}
            else:
                bound.arguments[name] = self._decoded(parameter, value)
        return self._function(*bound.args, **bound.kwargs)

    @property
    def _shown(self) -> str:
        return f"{self._name}{_readable(self._signature)}"

    def _unpacked(self, args: bytes) -> tuple[tuple[msgspec.Raw, ...], dict[str, msgspec.Raw]]:
        if not args:
            return (), {}
        try:
            return _packed.decode(args)
        except msgspec.MsgspecError as error:
            raise InvalidRequest("args", str(error), "msgpack of (positional arguments, arguments by name)") from None

    def _decoded(self, parameter: inspect.Parameter, value: msgspec.Raw) -> Any:
        name = parameter.name
        try:
            decoder = self._decoders.get(name)
            if decoder is None:
                decoder = self._decoders[name] = self._decoder(parameter)
            return decoder.decode(value)
        except _NotCarried as error:
            found = f"a parameter of type {error}"
            raise InvalidRequest(name, found, f"an annotation of {_PLAIN}", f"{self._name}: {name}: {found}") from None
        except (msgspec.MsgspecError, RecursionError) as error:
            found, valid = f"{_shown_value(value)} ({error})", str(_unquoted(parameter))
            text = f"{self._name}: {name}: found {found}; valid: {valid}"
            raise InvalidRequest(name, found, valid, text) from None

    def _decoder(self, parameter: inspect.Parameter) -> msgspec.msgpack.Decoder[Any]:
        if parameter.annotation is inspect.Parameter.empty:
            return msgspec.msgpack.Decoder(Any)
        namespace = getattr(inspect.unwrap(self._function), "__globals__", {})
        holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
        try:
            annotation = get_type_hints(holder, namespace, include_extras=True)[parameter.name]
            return msgspec.msgpack.Decoder(annotation, dec_hook=_decode_other)
        except Exception as error:  # whatever a string that stands for a type may come to
            raise _NotCarried(f"{parameter.annotation} ({type(error).__name__}: {error})") from None


def callable_names(cls: type, base: type) -> tuple[str, ...]:
    """The names that may be called on an instance of ``cls``, a subclass of ``base``, in order."""
    found = {name for owner in cls.__mro__ for name, value in _methods(owner) if _is_marked(value)}
    own = set(dir(base))
    for owner in _user_classes(cls, base):
        found.update(name for name, _ in _methods(owner) if name not in own)
    return tuple(sorted(name for name in found if not name.startswith("_")))


def free_names(base: type) -> str:
    """What a class may define, in words."""
    return f"names that drumline's {base.__name__} does not use itself"


def _user_classes(cls: type, base: type) -> Iterator[type]:
    """The worker classes between ``cls`` and ``base``, and the extension class that one of them mixes in."""
    for owner in cls.__mro__:
        if issubclass(owner, base) and owner is not base:
            yield owner
            extension = vars(owner).get("_drumline_extension")
            if extension is not None:
                yield extension


def _methods(owner: type) -> Iterator[tuple[str, object]]:
    for name, value in vars(owner).items():
        if isinstance(value, FunctionType | staticmethod | classmethod):
            yield name, value


def _is_marked(value: object) -> bool:
    return getattr(value, _MARK, False) is True


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _decode_other(kind: type, value: Any) -> Any:
    if kind is object:
        return value
    raise _NotCarried(kind)


def _encode_other(value: object) -> NoReturn:
    raise _NotCarried(type(value))


def _encoded(value: object, method: str) -> bytes:
    try:
        packed = msgspec.msgpack.encode(value, enc_hook=_encode_other)
    except _NotCarried as error:
        advice = "; of a tensor or an array return .tolist(), of one element .item()"
        raise InvalidRequest(f"the result of {method}", f"a {error}", _PLAIN + advice) from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"the result of {method}", str(error), _PLAIN) from None
    if len(packed) > MAX_RESULT_BYTES:
        found = f"{len(packed)} bytes of msgpack"
        raise InvalidRequest(f"the result of {method}", found, f"at most {MAX_RESULT_BYTES} bytes")
    return packed


class _Words(str):
    """An annotation that is written as a string, shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _unquoted(parameter: inspect.Parameter) -> inspect.Parameter:
    said = parameter.annotation
    return parameter.replace(annotation=_Words(said)) if isinstance(said, str) else parameter


def _readable(signature: inspect.Signature) -> inspect.Signature:
    said = signature.return_annotation
    return signature.replace(
        parameters=[_unquoted(one) for one in signature.parameters.values()],
        return_annotation=_Words(said) if isinstance(said, str) else said,
    )


def _shown_value(value: msgspec.Raw) -> str:
    try:
        shown = repr(msgspec.msgpack.decode(value))
    except (msgspec.MsgspecError, RecursionError):
        return f"{len(bytes(value))} bytes of msgpack"
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."


def failure(error: BaseException) -> ErrorInfo:
    """``error``, raised by a call, as data that a message can carry: kind ``remote_error`` unless it is one of ours."""
    trace = _escaped("".join(traceback.format_exception(error))[-MAX_TRACE_CHARACTERS:])
    if not isinstance(error, DrumlineError):
        return ErrorInfo(kind="remote_error", text=_text(_first_line(error)), traceback=trace)
    info = error.info
    return ErrorInfo(
        kind=_text(info.kind),
        text=_text(info.text),
        retryable=bool(info.retryable),
        traceback=trace,
        field=_text(info.field),
        found=_text(info.found),
        valid=_text(info.valid),
    )


def _first_line(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # the mistake of whoever wrote its __str__ is not to hide the error
        return f"{type(error).__name__}, which has no text"


def _text(value: object) -> str:
    """At most so much of it, with what UTF-8 has no form for escaped."""
    return _escaped(str(value)[:MAX_TEXT_CHARACTERS])


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
