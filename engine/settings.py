"""The base of all settings, and the checks that they make of themselves. Every check raises InvalidConfig."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from drumline.protocol.errors import InvalidConfig

LARGEST = (1 << 31) - 1
LARGEST_BYTES = 1 << 50
_MAX_SHOWN = 200


class _KnownKeywords(msgspec.StructMeta):
    """Makes a keyword that a settings struct does not have an InvalidConfig that says what it could have been."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = self.__struct_fields__
        for name, value in kwargs.items():
            if name not in known:
                reasons = getattr(self, "not_yet", {}), getattr(self, "elsewhere", {})
                raise unknown_setting(self.__name__, name, value, known, *reasons)
        return super().__call__(*args, **kwargs)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, metaclass=_KnownKeywords):
    """Base of the settings. ``not_yet``: names that a user of vLLM expects here, each with what to do without it;
    ``elsewhere``: those that are settings of a part, and how they are given there."""

    not_yet: ClassVar[Mapping[str, str]] = {}
    elsewhere: ClassVar[Mapping[str, str]] = {}


def unknown_setting(
    owner: str,
    name: str,
    value: object,
    known: tuple[str, ...],
    not_yet: Mapping[str, str],
    elsewhere: Mapping[str, str],
) -> InvalidConfig:
    """The error for a setting ``name`` that ``owner`` does not have: not in this version, elsewhere, or nowhere."""
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "..."
    if name in not_yet:
        return InvalidConfig(name, shown, f"leaving it out: {name} is not in this version; {not_yet[name]}")
    if name in elsewhere:
        return InvalidConfig(name, shown, f"{elsewhere[name]}; {owner} has no {name} of its own")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or list(known)
    return InvalidConfig(name, shown, f"a setting of {owner}, such as {', '.join(near)}; there is no {name}")


def check_whole(field: str, value: object, minimum: int, maximum: int = LARGEST) -> None:
    """A whole number in a range, no bool."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise InvalidConfig(field, value, f"a whole number, {minimum} to {maximum}")


def check_whole_or_none(field: str, value: object, minimum: int, maximum: int = LARGEST) -> None:
    """None or a whole number in a range."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum):
        raise InvalidConfig(field, value, f"None, or a whole number, {minimum} to {maximum}")


def check_number(field: str, value: object, above: float, maximum: float) -> None:
    """A number, whole or not, in a range whose lower end is excluded."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= maximum:
        raise InvalidConfig(field, value, f"a number above {above:g}, at most {maximum:g}")


def check_share(field: str, value: object) -> None:
    """A number, whole or not, from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise InvalidConfig(field, value, "a number from 0 to 1")


def check_boolean(field: str, value: object) -> None:
    """True or False, and nothing that merely counts as such."""
    if not isinstance(value, bool):
        raise InvalidConfig(field, value, "True or False")


def check_text(field: str, value: object) -> None:
    """A string that is not empty and can be told to another process."""
    if not isinstance(value, str) or not value:
        raise InvalidConfig(field, value, "a string that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        # A path of bytes that are no UTF-8, too: every process is told it as JSON.
        raise InvalidConfig(field, ascii(value), "text that is Unicode") from None


def check_one_of(field: str, value: object, valid: tuple[str, ...], not_yet: Mapping[str, str] | None = None) -> None:
    """One of a few names. ``not_yet``: names that are refused with a word of their own."""
    if isinstance(value, str) and value in valid:
        return
    choices = "one of " + ", ".join(valid) if len(valid) > 1 else valid[0]
    why = (not_yet or {}).get(value) if isinstance(value, str) else None
    raise InvalidConfig(field, value, f"{choices}; {value}: {why}" if why else choices)


def check_struct(field: str, value: object, cls: type) -> None:
    """An instance of ``cls``."""
    if not isinstance(value, cls):
        raise InvalidConfig(field, value, f"a {cls.__name__}")
