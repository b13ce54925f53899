"""The shapes of well-known models, so that a layout can be asked for without their files.

Each is a file of ``model_shapes`` with those keys of the model's public config.json that say its shape and arithmetic,
in the key style of transformers 4. A model that is published in a quantized form has the dtype it was trained in.
"""

from __future__ import annotations

from pathlib import Path

from drumline.protocol.configfields import read_json_object
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import ModelSpec

_FOLDER = Path(__file__).parent / "model_shapes"
_SUFFIX = ".json"


def known_models() -> tuple[str, ...]:
    """Their names, sorted."""
    return tuple(sorted(path.name.removesuffix(_SUFFIX) for path in _FOLDER.glob("*" + _SUFFIX)))


def known_spec(name: str) -> ModelSpec:
    """The shape of the model ``name``, in any case. Raises InvalidConfig, which lists what there is."""
    known = known_models()
    if name.lower() not in known:
        raise InvalidConfig("model", name, "one of " + ", ".join(known))
    path = _FOLDER / (name.lower() + _SUFFIX)
    return ModelSpec.from_config(read_json_object(path), path)
