"""The models that drumline computes: one decoder, whose parts the spec of a model chooses."""

from __future__ import annotations

from drumline.workers.models.build import ModelBuild
from drumline.workers.models.context import StepContext
from drumline.workers.models.decoder import Decoder

__all__ = ["Decoder", "ModelBuild", "StepContext"]
