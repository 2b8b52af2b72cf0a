"""A module's parameters by name: tied ones once, with all the places that hold them; blocks of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from engine.weights.recomputing import nothing_recomputed
from models import UnsupportedModelError

# What shares a coefficient.
Blocks: TypeAlias = Literal["parameter", "layer", "model"]
# Modules that hold a parameter, and the name that each has for it.
Places: TypeAlias = list[tuple[nn.Module, str]]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def root_of(model: Any) -> nn.Module:
    """The module behind what `models` opened, or the module itself. Raises TypeError for anything else."""
    module = getattr(model, "hf", model)
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module or a model of models.load(...), got {type(model).__name__}")
    return module


def name_of(model: Any) -> str:
    """What files and messages call a model."""
    module, name = root_of(model), getattr(model, "name", None)
    path = getattr(getattr(module, "config", None), "_name_or_path", None)
    return next((str(found) for found in (name, path) if isinstance(found, str) and found), type(module).__name__)


def aliases(module: nn.Module) -> dict[str, str]:
    """Every name of every parameter, to the first name of it: tied ones share that."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}


def places(module: nn.Module) -> dict[str, Places]:
    """Where each parameter is held, by its first name."""
    found: dict[str, Places] = {}
    names = aliases(module)
    for prefix, part in module.named_modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                found.setdefault(names[f"{prefix}.{key}" if prefix else key], []).append((part, key))
    return found


def blocks_of(names: Iterable[str], blocks: Blocks) -> list[str]:
    """The block of each parameter.

    A layer is what a name says up to its first number ("model.layers.3"); without a number, the module of the
    parameter. Raises ValueError for an unknown kind of block.
    """
    if blocks not in get_args(Blocks):
        raise ValueError(f"blocks must be one of {get_args(Blocks)}, got {blocks!r}")
    if blocks == "model":
        return ["model" for _ in names]
    return [name if blocks == "parameter" else _layer(name) for name in names]


def _layer(name: str) -> str:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1]) or name


def check_plain(module: nn.Module, what: str) -> None:
    """Raises UnsupportedModelError for weights that nothing can be added to: quantised, sharded, not in memory."""
    for name, part in module.named_modules():
        if hasattr(part, "_packed_params"):
            raise UnsupportedModelError(f"{what}: {name or 'the model'} is quantised; expected floating-point weights")
    for name, parameter in module.named_parameters():
        check_dense(name, parameter, what)


def check_dense(name: str, tensor: Any, what: str) -> None:
    """Raises UnsupportedModelError for one such."""
    kind = f"a {type(tensor).__name__} of {getattr(tensor, 'dtype', None)}"
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{what}: {name} is {kind}: quantised, or shared out; expected a dense tensor of float16 to float64"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise UnsupportedModelError(f"{what}: {name} is not in memory as a dense tensor; expected one that is")


@contextmanager
def swapped(found: Mapping[str, Places], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within: these tensors stand in all places of the parameters of their names."""
    held: list[tuple[nn.Module, str, Any]]
    held = [(part, key, part._parameters[key]) for name in tensors for part, key in found[name]]
    # What hooks (weight norm, spectral norm) compute of parameters is an attribute, and becomes what it was.
    beside = [
        (part, key, x) for part in {p for p, _, _ in held} for key, x in vars(part).items() if isinstance(x, Tensor)
    ]
    try:
        for name, tensor in tensors.items():
            for part, key in found[name]:
                part._parameters[key] = tensor  # type: ignore[assignment]
        _flatten(held)
        with nothing_recomputed():
            yield
    finally:
        for part, key, tensor in held:
            part._parameters[key] = tensor
        for part, key, x in beside:
            vars(part)[key] = x
        _flatten(held)


def _flatten(held: Iterable[tuple[nn.Module, str, Any]]) -> None:
    """Recurrent modules keep a list of their weights beside."""
    for part in {part for part, _, _ in held if isinstance(part, nn.RNNBase)}:
        part._flat_weights = [part._parameters.get(name) for name in part._flat_weights_names]
