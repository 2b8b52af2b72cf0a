"""Models behind one small interface: `models.load(name)` opens one, `models.wrap(hf_model)` takes one in memory."""

from models.interface import (
    IMAGE,
    Capabilities,
    Edit,
    Edits,
    Encoded,
    KeyValues,
    Model,
    Packed,
    Prompt,
    PromptLike,
    Segment,
    Shape,
    Site,
    SiteShape,
    UnsupportedModelError,
)
from models.linear import reordered
from models.opening import load, wrap

__all__ = [
    "IMAGE",
    "Capabilities",
    "Edit",
    "Edits",
    "Encoded",
    "KeyValues",
    "Model",
    "Packed",
    "Prompt",
    "PromptLike",
    "Segment",
    "Shape",
    "Site",
    "SiteShape",
    "UnsupportedModelError",
    "load",
    "reordered",
    "wrap",
]
