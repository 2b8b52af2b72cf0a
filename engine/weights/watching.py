"""Where the rows of a tensor go by its data: seen in what torch computes, while a model is looked at.

Three samples may happen to have as many rows each, in order, where others have not: experts that pick their tokens,
models that drop padding. Shapes do not say it; the functions that pick rows do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.weights.running import through

# Functions that pick rows by an index, and that place them by one.
PICK = ("index_select", "gather", "take")
PLACE = ("index_add", "index_copy", "index_reduce", "index_fill", "scatter", "scatter_add", "scatter_reduce", "put")


class Watch(TorchDispatchMode):
    """Within: what is computed of the inputs is known, by its memory, and the modules that picked its rows by data.

    picked:  modules whose pick of rows was given to a parameter. written: modules that wrote to a parameter.
    """

    supports_higher_order_operators = True  # flex attention, say: rows stay

    def __init__(self, module: nn.Module, inputs: Any, parameters: Any):
        super().__init__()
        self.module = module
        self.by: dict[StorageWeakRef, frozenset[str]] = {key: frozenset() for key in _memory(inputs)}
        self.parameters = set(_memory(parameters))
        self.picked: set[str] = set()
        self.written: set[str] = set()
        self.on: list[str] = []  # modules on the way, the innermost last
        self.apart = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        here = set() if self.apart else {self.on[-1] if self.on else ""}
        asked = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ()
        given = {one.name: args[i] if i < len(args) else kwargs.get(one.name) for i, one in enumerate(asked)}
        changed = [given[one.name] for one in asked if one.alias_info is not None and one.alias_info.is_write]
        if self.parameters.intersection(_memory(changed)):
            self.written |= here
        found = [self.by[key] for key in _memory((args, kwargs)) if key in self.by]
        if found:
            picked = here if asked and self._by_data(func, given) else set()
            for key in _memory((answer, changed)):
                self.by[key] = frozenset(picked).union(self.by.get(key, ()), *found)
        return answer

    def known(self, x: Any) -> bool:
        return any(key in self.by for key in _memory(x))

    def given(self, x: Any) -> None:
        """To a parameter, or to a module that runs apart."""
        self.picked |= {name for key in _memory(x) if key in self.by for name in self.by[key]}

    def _by_data(self, func: Any, given: Mapping[str, Any]) -> bool:
        """Whether rows (the first dimension) are picked, placed or put in order by what was computed of inputs."""
        x, index = given.get("self"), given.get("index")
        name = func.overloadpacket.__name__.strip("_") if func.namespace == "aten" else ""
        if name in ("index", "unsafe_index", "index_put", "unsafe_index_put", "index_put_impl"):
            first = given["indices"][0]
            if first is None or not self.known(first):
                return False
            if first.dtype in (torch.bool, torch.uint8):  # one value in many places: rows stay
                return "values" not in given or given["values"].numel() > 1
            return "values" in given or self.known(x)
        if name in PICK or name in PLACE:
            return _first(x, given.get("dim", 0)) and self.known(index) and (name in PLACE or self.known(x))
        if name == "embedding":  # of a table that is no parameter: computed of samples
            return self.known(given["weight"]) and self.known(given["indices"])
        if name in ("sort", "topk", "msort"):
            dim = given.get("dim")
            return name == "msort" or _first(x, -1 if dim is None else dim)
        return name == "pack_padded_sequence" or torch.Tag.dynamic_output_shape in func.tags


def _first(x: Any, dim: int) -> bool:
    return dim % max(x.ndim, 1) == 0


def _memory(given: Any) -> Iterator[StorageWeakRef]:
    for x in tree_leaves(given):
        if isinstance(x, Tensor) and x.layout == torch.strided:
            yield StorageWeakRef(x.untyped_storage())


@contextmanager
def watched(watch: Watch, apart: set[str]) -> Iterator[None]:
    """Within: the watch knows which module is on the way, of those that have parameters and do not run apart."""
    parts = [
        (name, part)
        for name, part in watch.module.named_modules()
        if name not in apart and next(part.parameters(), None) is not None
    ]
    with through(partial(_pass, watch), parts), watch:
        yield


def _pass(watch: Watch, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    watch.on.append(name)
    try:
        return forward(*args, **kwargs)
    finally:
        watch.on.pop()
