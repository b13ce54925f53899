"""Typed reading of the fields of a JSON object that somebody else wrote."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drumline.protocol.errors import InvalidConfig

MAX_CONFIG_BYTES = 16 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``, at most ``MAX_CONFIG_BYTES``. Raises InvalidConfig for anything else."""
    try:
        found = path.stat()
        # A pipe would be waited for, and a device may never end.
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise InvalidConfig(str(path), "a pipe, a device or a socket", "a regular file")
        if found.st_size > MAX_CONFIG_BYTES:
            raise InvalidConfig(str(path), f"{found.st_size} bytes", f"at most {MAX_CONFIG_BYTES} bytes of JSON")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InvalidConfig("model", f"no {path.name} in {path.parent}", f"a folder with {path.name}") from None
    except OSError as error:
        raise InvalidConfig(str(path), str(error), "a readable file") from error
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(str(path), f"text that is not JSON ({error})", "a JSON object") from error
    if not isinstance(value, dict):
        raise InvalidConfig(str(path), f"JSON of type {type(value).__name__}", "a JSON object")
    return value


class ConfigFields:
    """The fields of one JSON object; every method raises InvalidConfig that names the field and its file.

    ``null`` and a missing field are the same, except to :meth:`has`. A field without a ``default`` is required.
    ``path`` is what messages call the source.
    """

    def __init__(self, values: dict[str, Any], path: Path | str, prefix: str = "") -> None:
        self._values = values
        self._path = path
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """Whether the field is there, be it ``null``."""
        return name in self._values

    def objects(self) -> list[str]:
        """The names of the fields that hold an object."""
        return [name for name, value in self._values.items() if isinstance(value, dict)]

    def raw(self, name: str) -> Any:
        """The value as JSON gave it, None when absent."""
        return self._values.get(name)

    def invalid(self, name: str, found: object, valid: str) -> InvalidConfig:
        """The error that says ``name`` of this file cannot be ``found``."""
        field = self._prefix + name
        shown = repr(found)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        return InvalidConfig(field, shown, valid, f"{self._path}: {field}: found {shown}; valid: {valid}")

    def inside(self, name: str) -> ConfigFields:
        """The fields of the object that stands at ``name``."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self.invalid(name, value, "an object")
        return ConfigFields(value, self._path, f"{self._prefix}{name}.")

    def integer(self, name: str, *, minimum: int, maximum: int = (1 << 31) - 1, default: int | None = None) -> int:
        """A whole number, ``minimum`` to ``maximum`` (below 2**31, so that every product of two stays exact)."""
        value = self._values.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.invalid(name, value, f"a whole number, {minimum} to {maximum}")
        return value

    def number(self, name: str, *, above: float, default: float | None = None) -> float:
        """A finite number greater than ``above``."""
        value = self._values.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.invalid(name, value, f"a number above {above:g}")
        # The comparison comes first: a whole number too large for a float must not get as far as float().
        if not above < value < 1e300 or not math.isfinite(value):
            raise self.invalid(name, value, f"a finite number above {above:g}")
        return float(value)

    def number_or_zero(self, name: str, *, maximum: float) -> float:
        """A number from 0 to ``maximum``; 0 when absent."""
        value = self._values.get(name)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
            raise self.invalid(name, value, f"a number from 0 to {maximum:g}")
        return float(value)

    def one_of(self, name: str, valid: Sequence[str], *, default: str) -> str:
        """One of the words of ``valid``."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in valid:
            raise self.invalid(name, value, "one of " + ", ".join(valid))
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """true or false; ``default`` when absent."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(name, value, "true or false")
        return value

    def integers(self, name: str, *, minimum: int, limit: int, single: bool) -> tuple[int, ...] | None:
        """A list of whole numbers from ``minimum`` to ``limit`` - 1 (``single``: or one alone), None when absent."""
        value = self._values.get(name)
        if value is None:
            return None
        items = [value] if single and not isinstance(value, list) else value
        valid = f"{'a whole number or a list' if single else 'a list'} of whole numbers, {minimum} to {limit - 1}"
        if not isinstance(items, list):
            raise self.invalid(name, value, valid)
        for item in items:
            if not isinstance(item, int) or isinstance(item, bool) or not minimum <= item < limit:
                raise self.invalid(name, item, valid)
        return tuple(items)
