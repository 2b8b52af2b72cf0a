"""Nodes of the computational graph by name: "a3.h1" is head 1 of layer 3, "a3.h1<q>" its query, "m3" the MLP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from models import Model, Site
from models.reading import as_int

NODE = re.compile(r"a(?P<layer>\d+)\.h(?P<head>\d+)(?:<(?P<part>[qkv])>)?|m(?P<mlp>\d+)|(?P<logits>logits)")


@dataclass(frozen=True)
class Node:
    """site: "z" a head, "mlp_out" an MLP, "q", "k", "v" what a head is given (k and v: a key/value head); "resid_post"
    the logits, which are given what the last layer gives.
    """

    site: Site
    layer: int
    unit: int = 0

    def __str__(self) -> str:
        if self.site == "resid_post":
            return "logits"
        if self.site == "mlp_out":
            return f"m{self.layer}"
        return f"a{self.layer}.h{self.unit}" + ("" if self.site == "z" else f"<{self.site}>")


def read_node(model: Model, given: Any) -> Node:
    """A name; or (layer, head), (layer, head, "q"). Raises ValueError for anything else, IndexError out of range."""
    name = given
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) in (2, 3):
        layer, head, *part = given
        if None not in (as_int(layer), as_int(head)):
            name = f"a{as_int(layer)}.h{as_int(head)}" + "".join(f"<{x}>" for x in part)
    found = NODE.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f'expected a node such as "a3.h1", "a3.h1<q>", "m3", "logits" or (layer, head), got {given!r}')
    if found["logits"]:
        return Node("resid_post", model.shape.n_layers - 1)
    if found["mlp"]:
        node = Node("mlp_out", int(found["mlp"]))
    else:
        node = Node(cast(Site, found["part"] or "z"), int(found["layer"]), int(found["head"]))
    size = model.site(node.site)
    if node.layer >= size.n_layers or node.unit >= size.units:
        raise IndexError(
            f"{given!r} is out of range: {model.name} has {size.n_layers} layers x {size.units} of {node.site}"
        )
    return node
