"""A parameter while a call is on its way: it stands in the module, and whoever reads it asks the call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# What may be asked of any tensor: it is the same for all samples.
ASKED = {
    *(
        "dtype",
        "device",
        "layout",
        "shape",
        "ndim",
        "names",
        "itemsize",
        "requires_grad",
        "is_leaf",
        "is_cuda",
        "is_cpu",
    ),
    *("is_mps", "is_xpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "is_floating_point", "is_complex"),
    *("is_inference", "is_contiguous", "size", "dim", "numel", "nelement", "stride", "element_size", "get_device"),
    "__len__",
}


# Of `__iadd__` and its like.
INPLACE = {
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
}


class ReadApart(Exception):  # noqa: N818
    """A parameter was read in a way that is not known for many samples at once: its module runs sample by sample."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


@runtime_checkable
class Reader(Protocol):
    """A call: it answers functions of kept parameters."""

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...


class Kept(Tensor):
    """A parameter, or what was computed of parameters alone.

    plain: the base's. parameter: its name. whole: it is the parameter itself. turned: it is that, a matrix, transposed.
    value: of each sample, [batch, *shape]; that of a whole parameter is merged when it is needed.
    """

    plain: Tensor
    parameter: str
    whole: bool
    turned: bool
    value: Tensor | None
    call: Reader

    @staticmethod
    def of(call: Reader, parameter: str, plain: Tensor, whole: bool = True, value: Tensor | None = None) -> Kept:
        kept = Tensor._make_subclass(Kept, plain.detach())
        kept.call, kept.parameter, kept.plain, kept.whole, kept.value = call, parameter, plain, whole, value
        kept._is_param, kept.turned = whole, False  # _is_param: isinstance(kept, nn.Parameter)
        return kept

    def turn(self) -> Kept:
        kept = Kept.of(self.call, self.parameter, self.plain.mT)
        kept._is_param, kept.turned = False, not self.turned
        return kept

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if asks(func):
            return func(*plain(args), **plain(kwargs))
        if turns(func, args):
            return args[0].turn()
        return next(kept_in((args, kwargs))).call.apply(func, args, kwargs)


def turns(func: Any, args: Any) -> bool:
    """Whether a function transposes a parameter that is a matrix."""
    if not args or not isinstance(args[0], Kept) or not args[0].whole or args[0].ndim != 2:
        return False
    name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
    return name in ("T", "mT", "t") or (name == "transpose" and sorted(at % 2 for at in args[1:]) == [0, 1])


def asks(func: Any) -> bool:
    """Whether a function asks what is the same for all samples: a dtype, a size."""
    name = func.__name__
    return (func.__self__.__name__ if name == "__get__" else name) in ASKED


def writes(func: Any) -> bool:
    """Whether a function writes to its first operand, by torch's names: `clamp_`, `__setitem__`, `__iadd__`."""
    name = func.__name__
    inner = name.strip("_")
    return name == "__set__" or inner == "setitem" or name == f"{inner}_" or (name[:3] == "__i" and inner in INPLACE)


def tensors_in(given: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def kept_in(given: Any) -> Any:
    return (leaf for leaf in tree_leaves(given) if isinstance(leaf, Kept))


def plain(given: Any) -> Any:
    """With the base's parameters in place of those kept."""
    return tree_map_only(Kept, lambda kept: kept.plain, given)


def of_samples(func: Callable[..., Any], args: Any, kwargs: Any, values: list[Tensor], name: str) -> Tensor:
    """A function of kept parameters, and of what all samples share, for each sample: [batch, *shape]."""

    def one(*given: Tensor) -> Any:
        each = iter(given)
        mine, named = tree_map_only(Kept, lambda _: next(each), (args, dict(kwargs)))
        return func(*mine, **named)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            found = torch.vmap(one)(*values)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ReadApart(name) from error
    if not isinstance(found, Tensor):
        raise ReadApart(name)
    return found
