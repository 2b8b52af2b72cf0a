"""A forward of many samples with weights of their own: parameters are kept, and answer functions for each sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from engine.weights.kept import Kept, ReadApart, kept_in, of_samples, plain, tensors_in, writes
from engine.weights.layers import LAYERS, NAMES
from engine.weights.naive import Dims, joined
from engine.weights.parameters import places, swapped
from engine.weights.products import SAMPLES, Way
from engine.weights.reading import Composition
from engine.weights.recomputing import again
from models import UnsupportedModelError


@dataclass(frozen=True)
class Use:
    """A function of a parameter.

    rows:   of each of its tensors, first dimension per sample; 0: all samples share it.
    shared: no tensor but parameters differs between samples: so it is known for each sample, like a parameter.
    """

    function: str
    rows: tuple[int, ...]
    shared: bool


@dataclass(frozen=True)
class Layout:
    """What a model does with its parameters.

    uses:  in order, by parameter.
    apart: modules that run sample by sample, and the rows of the tensors given to each; none if it was not called.
    dims:  which dimension of each of their outputs is samples.
    """

    uses: Mapping[str, tuple[Use, ...]] = field(default_factory=dict)
    apart: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dims: Mapping[str, Dims] = field(default_factory=dict)


class Running:
    """One forward."""

    def __init__(self, module: nn.Module, composition: Composition, layout: Layout, way: Way):
        self.module, self.composition, self.layout, self.way = module, composition, layout, way
        self.batch = len(composition.coefficients)
        self.most = SAMPLES * max(p.numel() for p in composition.base.values())
        self.seen: Counter[str] = Counter()

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = next(kept_in((args, kwargs))).parameter
        operands = tensors_in((args, kwargs))
        if writes(func) and isinstance(operands[0], Kept):  # in training alone: it was not looked at
            raise ReadApart(name)
        if all(isinstance(x, Kept) for x in operands):
            return self._shared(func, args, kwargs, name)
        use = self._use(name, func, operands)
        rows = {id(x): n for x, n in zip(operands, use.rows, strict=True)}
        if func not in LAYERS and use.shared:
            return self._shared(func, args, kwargs, name)
        read = Reading(self, rows)
        y = LAYERS[func](read, *args, **kwargs) if func in LAYERS and kwargs.keys() <= NAMES[func] else NotImplemented
        if y is NotImplemented:
            y = read.mapped(func, args, kwargs, name)
        if use.shared:
            return Kept.of(self, name, func(*plain(args), **plain(dict(kwargs))), whole=False, value=y)
        return y.flatten(0, 1)

    def _use(self, name: str, func: Callable[..., Any], operands: list[Tensor]) -> Use:
        at, known = self.seen[name], self.layout.uses.get(name, ())
        self.seen[name] += 1
        if at >= len(known) or known[at].function != func.__name__ or len(known[at].rows) != len(operands):
            raise ReadApart(name)
        for x, n in zip(operands, known[at].rows, strict=True):
            if n and (not x.ndim or x.shape[0] != n * self.batch):
                raise ReadApart(name)
        return known[at]

    def _shared(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], name: str) -> Kept:
        values = [self.value(kept) for kept in kept_in((args, kwargs))]
        value = of_samples(func, args, kwargs, values, name)
        return Kept.of(self, name, func(*plain(args), **plain(dict(kwargs))), whole=False, value=value)

    def value(self, kept: Kept) -> Tensor:
        """[batch, *shape], if that takes no more memory than a few of the largest matrices."""
        if kept.value is not None:
            return kept.value
        if self.batch * kept.plain.numel() > self.most:
            raise ReadApart(kept.parameter)
        merged = self.composition.merged(kept.parameter)
        return merged.mT if kept.turned else merged

    def gate(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the forward of a module that runs sample by sample."""
        flat, spec = tree_flatten((args, kwargs))
        at = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        rows = self.layout.apart[name]
        if not any(rows) or len(rows) != len(at) or any(isinstance(flat[i], Kept) for i in at):
            raise ReadApart(_inside(self.module, name))
        if any(n and flat[i].shape[0] != n * self.batch for i, n in zip(at, rows, strict=True)):
            raise ReadApart(_inside(self.module, name))
        found = places(self.module)
        inside = {id(part) for part in self.module.get_submodule(name).modules()}
        below = {key: [(part, k) for part, k in held if id(part) in inside] for key, held in found.items()}
        below = {key: held for key, held in below.items() if held}

        def one(sample: Composition, leaves: list[Any]) -> Any:
            mine, named = tree_unflatten(leaves, spec)
            with swapped(below, {key: sample.merged(key) for key in below}):
                return forward(*mine, **named)

        answers = []
        for b in range(self.batch):
            leaves = list(flat)
            for i, n in zip(at, rows, strict=True):
                leaves[i] = flat[i][b * n : (b + 1) * n] if n else flat[i]
            run = partial(one, self.composition.sample(b), leaves)
            graph = torch.is_grad_enabled()
            answers.append(again(run) if graph else run())  # nothing merged is kept
        return joined(answers, self.layout.dims[name])


class Reading:
    """One function of kept parameters, on its way (`layers.Read`)."""

    def __init__(self, running: Running, rows: Mapping[int, int]):
        self.running, self.rows = running, rows
        self.composition, self.way = running.composition, running.way

    def samples(self, operand: Any) -> Tensor:
        batch, n = self.running.batch, self.rows[id(operand)]
        if not isinstance(operand, Kept):
            return operand.unflatten(0, (batch, n)) if n else operand.expand(batch, *operand.shape)
        value = self.running.value(operand)
        if not n:
            return value
        own = value.unflatten(1, (batch, n)).diagonal(dim1=0, dim2=1)  # [n, *, batch]: each sample's own rows
        return own.movedim(-1, 0)

    def mapped(self, func: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Tensor:
        """The function as each sample's own forward would call it."""
        values = iter([self.samples(x) for x in tensors_in((args, kwargs))])
        ours = Kept  # every tensor stands for its samples
        mine, named = tree_map_only(Tensor, lambda x: _stand_in(x, ours), (args, dict(kwargs)))
        return of_samples(func, mine, named, list(values), name)


def _stand_in(x: Tensor, kind: type[Kept]) -> Kept:
    return x if isinstance(x, kind) else Tensor._make_subclass(kind, x.detach())


def _inside(module: nn.Module, name: str) -> str:
    """A parameter of a module: its next owner is asked next."""
    found = {id(part): key for key, held in places(module).items() for part, _ in held}
    return next(found[id(part)] for part in module.get_submodule(name).modules() if id(part) in found)


@contextmanager
def installed(
    module: nn.Module, call: Any, base: Mapping[str, Tensor], apart: Mapping[str, Any] | set[str]
) -> Iterator[None]:
    """Within: parameters are kept, and modules that run apart go through the call's gate."""
    outer = [name for name in apart if not any(name != o and (o == "" or name.startswith(f"{o}.")) for o in apart)]
    gated = [(name, module.get_submodule(name)) for name in outer]
    kept = {name: Kept.of(call, name, tensor) for name, tensor in base.items()}
    with swapped(places(module), kept), through(call.gate, gated):
        yield


@contextmanager
def through(gate: Callable[..., Any], parts: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Within: what calls one of the modules calls gate(name, its forward, ...)."""
    before = [part.__dict__.get("forward") for _, part in parts]
    try:
        for name, part in parts:
            part.forward = partial(gate, name, part.forward)
        yield
    finally:
        for (_, part), forward in zip(parts, before, strict=True):
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.__dict__["forward"] = forward


def run(module: nn.Module, args: Any, named: Any, composition: Composition, layout: Layout, way: Way) -> Any:
    """Raises ReadApart for a parameter that was not read as the layout says."""
    call = Running(module, composition, layout, way)
    with installed(module, call, composition.base, layout.apart):
        answer = module(*args, **named)
    return tree_map_only(Kept, lambda kept: _answer(call, kept), answer)


def _answer(call: Running, kept: Kept) -> Tensor:
    if not kept.ndim:
        raise UnsupportedModelError("the model gives a number for the whole batch: give no labels, ask for no loss")
    return call.value(kept).flatten(0, 1)
