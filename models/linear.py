"""Linear layers of a float32 model on the CPU through oneDNN, for the length of one call.

torch computes them by MKL, which uses half the vector width of AMD processors; oneDNN uses all of it. The arithmetic is
float32 either way and nothing is copied: only the order of summation differs, as it does between two batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from models.calls import Passing, current


def onednn_layers(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """The plain linear layers with plain weights (sharded ones are DTensors), if this torch has the operation."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
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
    plain = x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu" and x.numel()
    if others or not plain:
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
