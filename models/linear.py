"""Linear layers of a float32 model on the CPU through oneDNN, for the length of one call.

torch computes them by MKL, which uses half the vector width of AMD processors; oneDNN uses all of it. The arithmetic is
float32 either way and nothing is copied: only the order of summation differs, as it does between two batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.calls import Passing, current
from models.interface import Model, UnsupportedModelError
from models.shapes import Float

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ROWS = 32  # tokens that the order of packed weights is best for


class Pack(NamedTuple):
    """Weights of a layer once more, in the order that oneDNN multiplies by. version: of the weight then."""

    weight: Tensor
    version: int
    reordered: Tensor


# By layer, of the models that are packed in this context.
PACKS: ContextVar[Mapping[nn.Linear, Pack]] = ContextVar("packs", default=MappingProxyType({}))


def onednn_layers(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """The plain linear layers with plain weights (sharded ones are DTensors), if this torch has the operation."""
    if not HAS_ONEDNN:
        return []
    return [m for m in modules if type(m) is nn.Linear and type(m.weight) is nn.Parameter]


@contextmanager
def onednn_linear(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Within: layers that nobody else has wrapped multiply by oneDNN, unless gradients are recorded."""
    free = [] if torch.is_grad_enabled() else [layer for layer in layers if "forward" not in layer.__dict__]
    try:
        for layer in free:
            layer.forward = Passing(partial(_multiply, layer))  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer in free:
            layer.__dict__.pop("forward", None)


def _multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    others = current() is None  # a forward beside ours, which may record gradients
    if others or not multiplies(x, weight):
        return nn.functional.linear(x, weight, bias)
    pack = PACKS.get().get(layer) if x.numel() > x.shape[-1] else None  # one token would be summed in another order
    if pack is not None and pack.weight is weight and pack.version == weight._version:
        weight = pack.reordered
    return onednn(x, weight, bias)


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn` can. It can also by a part of a larger matrix, but takes a thousand times as long for it."""
    plain = x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu" and x.numel()
    return bool(HAS_ONEDNN and plain and (weight.is_contiguous() or weight.mT.is_contiguous()))


def onednn(x: Float[Tensor, "*tokens in"], weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> Tensor:
    """Gives x weight^T + bias, without gradients."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@contextmanager
def reordered(model: Model) -> Iterator[None]:
    """Within: linear layers multiply by weights that were reordered once, in place of at every call; the same bits.

    model: float32, on the CPU. Takes the memory of a second copy of its linear weights while it lasts, and pays for
           calls of few tokens: rows on a prefix that is used again. Only this thread sees it; so do not write weights
           meanwhile: a layer whose weights torch knows to be written is multiplied by the new ones as without this.

    Raises UnsupportedModelError if there is no layer to reorder: another dtype or device, layers that somebody wraps
    (nnsight), a torch without oneDNN. RuntimeError at the end if weights were written unseen (through `.data`), since
    what was computed in between is of the old ones.

    >>> with models.reordered(model):
    ...     logits = engine.patch(model, "Q: hot\\nA:", heads=masks, values=means)
    """
    packs = packs_of(model)
    token = PACKS.set({**PACKS.get(), **packs})
    try:
        yield
    finally:
        PACKS.reset(token)
    for layer, (weight, version, reordered) in packs.items():
        if weight is layer.weight and version == weight._version and not _same_bits(reordered.to_dense(), weight):
            raise RuntimeError(
                f"weights of {model.name} were written while they were reordered, through .data (a layer "
                f"{list(weight.shape)}): what was computed since is of the old ones. Write them before"
            )


def packs_of(model: Model) -> dict[nn.Linear, Pack]:
    """Of all linear layers that can be. Raises as `reordered`."""
    hf: Any = getattr(model, "hf", None)
    if not isinstance(hf, nn.Module):
        raise TypeError(f"expected a model of models.load or models.wrap, got {type(model).__name__}")
    layers = [layer for layer in onednn_layers(list(hf.modules())) if _plain(layer)]
    if not layers:
        raise UnsupportedModelError(
            f"{model.name} has no linear layers to reorder: expected float32 weights on the CPU"
        )
    with torch.no_grad():
        return {layer: Pack(layer.weight, layer.weight._version, reorder(layer.weight)) for layer in layers}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Of float32; NaN as well."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _plain(layer: nn.Linear) -> bool:
    weight = layer.weight
    mine = "forward" not in layer.__dict__ and not weight.is_inference()
    return mine and weight.dtype == torch.float32 and weight.device.type == "cpu"


def reorder(weight: Float[Tensor, "out in"], tokens: int = ROWS) -> Tensor:
    """A copy that `onednn` multiplies so many tokens by best."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), tokens)
    return found
