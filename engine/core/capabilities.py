"""What is established of a model's ways of running rows, for the state that the model is in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from models import Capabilities, Model


@dataclass(frozen=True)
class Established:
    """can: by the model's rules, less what checks refused. checked: by way and site, tokens of the longest
    prompt compared.
    """

    state: Hashable
    can: Capabilities
    checked: Mapping[tuple[str, str], int] = field(default_factory=dict)


# By model, and whether prompts have images.
_known: WeakKeyDictionary[Model, dict[bool, Established]] = WeakKeyDictionary()


def known(model: Model, images: bool = False, state: Hashable = None) -> Established:
    """Renewed by the model's rules when anything changed that they, or results, depend on; state: if just asked for."""
    state, found = state or model.state(), _known.setdefault(model, {}).get(images)
    return (
        found if found is not None and found.state == state else learn(model, images, Established(state, model.rules()))
    )


def learn(model: Model, images: bool, found: Established) -> Established:
    _known.setdefault(model, {})[images] = found
    return found
