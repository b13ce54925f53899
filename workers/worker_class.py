"""Which class a rank's worker is: our own, a user's subclass of it, and a user's extension mixed into either."""

from __future__ import annotations

import importlib
from typing import TypeVar

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import CONTROL_METHODS
from drumline.workers.remote_methods import free_names

W = TypeVar("W")

AUTO = "auto"


def worker_class(base: type[W], worker_cls: str, worker_extension_cls: str) -> type[W]:
    """``base`` for "auto", else the class that ``worker_cls`` names, with the extension that the other names mixed in.

    Names are ``module.Class`` or ``module:Class``, imported here, in the rank. An extension is a plain class: the
    result is a subclass of it and of the worker class, in this order.

    Raises InvalidConfig that names the field, what was found and what is valid: a name that cannot be imported, a
    worker class that is no subclass of ``base``, an extension that defines a name which the worker uses.
    """
    cls = base
    if worker_cls != AUTO:
        found = _imported("worker_cls", worker_cls)
        if not issubclass(found, base):
            valid = f"{AUTO}, or a subclass of drumline.workers.{base.__name__}"
            raise InvalidConfig("worker_cls", f"{worker_cls}, which is no {base.__name__}", valid)
        cls = found
        _refuse("worker_cls", worker_cls, [name for name in CONTROL_METHODS if hasattr(cls, name)], base)
    if not worker_extension_cls:
        return cls
    extension = _imported("worker_extension_cls", worker_extension_cls)
    if issubclass(extension, base):
        valid = f"a plain class that is mixed into the worker; a {base.__name__} is named by worker_cls"
        raise InvalidConfig("worker_extension_cls", f"{worker_extension_cls}, a {base.__name__}", valid)
    _refuse("worker_extension_cls", worker_extension_cls, _clashes(extension, cls), base)
    name = f"{cls.__name__}With{extension.__name__}"
    try:
        return type(name, (extension, cls), {"__module__": cls.__module__, "_drumline_extension": extension})
    except Exception as error:  # whatever the extension's metaclass or __init_subclass__ has against it
        valid = f"a class that can be mixed into {cls.__name__}"
        raise InvalidConfig(
            "worker_extension_cls", f"{worker_extension_cls} ({type(error).__name__}: {error})", valid
        ) from error


def _clashes(extension: type, cls: type) -> list[str]:
    names = {name for owner in extension.__mro__[:-1] for name in vars(owner)}
    public = {name for name in names if not (name.startswith("__") and name.endswith("__"))}
    return sorted(name for name in public if name in CONTROL_METHODS or hasattr(cls, name))


def _refuse(field: str, named: str, clashes: list[str], base: type) -> None:
    if clashes:
        raise InvalidConfig(field, f"{named}, which defines {', '.join(clashes)}", free_names(base))


def _imported(field: str, named: str) -> type:
    """The class called ``module.Class`` or ``module:Class``."""
    module_name, _, name = named.rpartition(":" if ":" in named else ".")
    valid = "module.Class or module:Class, of a module that the rank can import"
    if not module_name or not name or module_name.startswith("."):
        raise InvalidConfig(field, repr(named), valid)
    if module_name == "__main__":
        raise InvalidConfig(field, f"{named}: the script of the app is not imported by ranks", valid)
    try:
        found: object = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a module of somebody else's does when it is imported
        raise InvalidConfig(field, f"{named} ({type(error).__name__}: {error})", valid) from error
    found = getattr(found, name, None)
    if not isinstance(found, type):
        raise InvalidConfig(field, f"{named}: module {module_name} has no class {name}", valid)
    return found
