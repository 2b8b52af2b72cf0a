"""What a model does with its parameters, seen in forwards of two and of three samples; and whether that is exact.

What grows from two to three samples belongs to samples, if the first two have the same in both; what does not grow,
they share. Where that cannot be told, or a function has no form for many samples, the module of the parameter runs
sample by sample, or the module around it; so does a module that picks rows by data (`weights.watching`). Then three
samples with weights drawn at random are compared with `naive`.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from engine.weights import naive
from engine.weights.kept import Kept, ReadApart, kept_in, plain, tensors_in
from engine.weights.parameters import places, swapped
from engine.weights.products import Way
from engine.weights.reading import Composition
from engine.weights.running import Layout, Use, installed, run
from engine.weights.watching import Watch, watched
from models import UnsupportedModelError

# By module, and the state that it was seen in.
_known: WeakKeyDictionary[nn.Module, dict[Hashable, Layout]] = WeakKeyDictionary()
# What is computed of parameters is looked at once more for each step of it that all samples share.
SETTLED = 32
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the largest output; narrower dtypes: 0.05


@dataclass(frozen=True)
class Glance:
    """A tensor as it was seen: its shape, whether it was kept, and of each sample that its rows may be of, two sums."""

    shape: tuple[int, ...]
    kept: bool
    sums: Tensor | None

    @classmethod
    def at(cls, x: Tensor, count: int) -> Glance:
        shape = tuple(x.shape)
        if not shape or not shape[0] or shape[0] % count or isinstance(x, Kept) or x.is_complex():
            return cls(shape, isinstance(x, Kept), None)
        each = x.detach().double().reshape(count, -1)
        return cls(shape, False, torch.stack([each.abs().sum(dim=1), each.square().sum(dim=1)]))


@dataclass
class Sighting:
    """A forward of a few samples with the base's weights.

    count: samples. shared: uses whose result is known for each sample, like a parameter.
    uses:  by parameter, functions and what they are given; nothing for what is no function of many samples.
    given: what modules that run apart are given. answered: the shapes of what they answer.
    """

    module: nn.Module
    count: int
    watch: Watch
    shared: Collection[tuple[str, int]]
    uses: dict[str, list[tuple[str, tuple[Glance, ...]]]] = field(default_factory=lambda: defaultdict(list))
    given: dict[str, tuple[Glance, ...]] = field(default_factory=dict)
    answered: dict[str, list[Any]] = field(default_factory=dict)

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = next(kept_in((args, kwargs))).parameter
        operands = tensors_in((args, kwargs))
        self.watch.given(plain(operands))
        glances = tuple(Glance.at(x, self.count) for x in operands)  # before: it may write to them
        answer = func(*plain(args), **plain(dict(kwargs)))
        single = isinstance(answer, Tensor)
        if single and all(isinstance(x, Kept) for x in operands):
            return Kept.of(self, name, answer, whole=False)
        self.uses[name].append((func.__name__, glances if single else ()))
        shared = single and (name, len(self.uses[name]) - 1) in self.shared
        return Kept.of(self, name, answer, whole=False) if shared else answer

    def gate(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.watch.given(plain((args, kwargs)))
        self.given[name] = tuple(Glance.at(x, self.count) for x in tensors_in((args, kwargs)))
        inside = {id(part) for part in self.module.get_submodule(name).modules()}
        found = {key: [one for one in held if id(one[0]) in inside] for key, held in places(self.module).items()}
        own = {key: held[0][0]._parameters[held[0][1]] for key, held in found.items() if held}
        with swapped(found, {key: kept.plain for key, kept in own.items()}):  # type: ignore[union-attr]
            self.watch.apart += 1
            try:
                answer = forward(*plain(args), **plain(kwargs))
            finally:
                self.watch.apart -= 1
        self.answered[name] = naive.shapes(answer)
        return answer


def layout_of(module: nn.Module, args: Any, named: Any, composition: Composition, way: Way) -> Layout:
    """What is known of the module in its present state, looked for when it is first met in it.

    Warns if the module cannot be run for many samples at once, and then runs all of it sample by sample.
    """
    state = _state(module, args, named)
    known = _known.setdefault(module, {})
    if state not in known:
        known[state] = _look(module, args, named, composition, set(), way)
    return known[state]


def widened(
    module: nn.Module, args: Any, named: Any, composition: Composition, way: Way, before: Layout, parameter: str
) -> Layout:
    """A layout for a parameter that was not read as that before says: a module more runs apart.

    Raises UnsupportedModelError where all of them do.
    """
    if "" in before.apart:
        said = "expected every tensor that it is given to begin with samples"
        raise UnsupportedModelError(f"{type(module).__name__} cannot be run sample by sample: {said}")
    alone = {*before.apart, _next(module, parameter, before.apart)}
    found = _look(module, args, named, composition, alone, way)
    _known.setdefault(module, {})[_state(module, args, named)] = found
    return found


def _look(module: nn.Module, args: Any, named: Any, made: Composition, alone: set[str], way: Way) -> Layout:
    """alone: what runs apart already. Every round but the last few has a module more of them."""
    two, three = (_few(args, named, len(made.coefficients), n) for n in (2, 3))
    shared: set[tuple[str, int]] = set()
    draw = torch.Generator().manual_seed(0)
    c = torch.rand(3, *made.coefficients.shape[1:], generator=draw, dtype=torch.float64) * 2 / len(made.vectors)
    small = replace(made, coefficients=c.to(made.coefficients.detach()))
    with _settled(module):
        want = naive.rows(module, three[0], three[1], small)
        copies = {name: p.clone() for name, p in made.base.items()}  # what is looked at may write to them
        unsettled = 0
        while "" not in alone and unsettled < SETTLED:
            seen = [Sighting(module, n, Watch(module, few, copies), shared) for n, few in ((2, two), (3, three))]
            for sighting, few in zip(seen, (two, three), strict=True):
                with installed(module, sighting, copies, alone), watched(sighting.watch, alone):
                    module(*few[0], **few[1])
            layout, failing, more = _compare(seen[0], seen[1], alone)
            by_data = {name for sighting in seen for name in sighting.watch.picked | sighting.watch.written}
            if not failing and not by_data and more == shared:
                try:
                    got = run(module, three[0], three[1], small, layout, way)
                except ReadApart as error:
                    failing = {error.name}
                else:
                    if why := _differs(got, want):
                        said = f"{type(module).__name__} with weights for each sample is not exact for many at once"
                        warnings.warn(f"{said} ({why}): each sample is merged and run by itself", stacklevel=4)
                        break
                    return layout
            unsettled = 0 if failing or by_data else unsettled + 1
            alone |= {_next(module, name, alone) for name in failing} | by_data
            shared = more
        dims = naive.dims(module, three[0], three[1], small)
    return Layout(apart={"": (1,) * len(tensors_in(three))}, dims={"": dims})


def _compare(two: Sighting, three: Sighting, alone: Collection[str]) -> tuple[Layout, set[str], set[tuple[str, int]]]:
    """The layout, parameters that are read in a way that cannot be told, uses whose operands all samples share."""
    uses: dict[str, tuple[Use, ...]] = {}
    failing: set[str] = set()
    for name in two.uses.keys() | three.uses.keys():
        pairs = list(zip(two.uses[name], three.uses[name], strict=False))
        found = [_use(a, b) for a, b in pairs]
        if len(two.uses[name]) != len(three.uses[name]) or None in found:
            failing.add(name)
        else:
            uses[name] = tuple(use for use in found if use is not None)
    apart: dict[str, tuple[int, ...]] = dict.fromkeys(alone, ())
    dims: dict[str, naive.Dims] = {}
    for name in two.given.keys() | three.given.keys():
        rows = _rows(two.given.get(name, ()), three.given.get(name, ()))
        of = naive.grown(two.answered.get(name, ()), three.answered.get(name, ()), 2, 3)
        tensors = [shape is not None for shape in two.answered.get(name, ())]
        if rows is None or not any(rows) or of is None or any(x and d < 0 for x, d in zip(tensors, of, strict=True)):
            failing.add(_some_parameter(two.module, name))
        else:
            apart[name], dims[name] = rows, of
    shared = {(name, at) for name, of in uses.items() for at, use in enumerate(of) if use.shared}
    return Layout(uses, apart, dims), failing, shared


def _use(two: tuple[str, tuple[Glance, ...]], three: tuple[str, tuple[Glance, ...]]) -> Use | None:
    rows = _rows(two[1], three[1])
    if two[0] != three[0] or not rows:
        return None
    return Use(two[0], rows, not any(n for n, glance in zip(rows, two[1], strict=True) if not glance.kept))


def _rows(two: tuple[Glance, ...], three: tuple[Glance, ...]) -> tuple[int, ...] | None:
    """Rows per sample of each tensor; None where that cannot be told."""
    if len(two) != len(three):
        return None
    found = []
    for a, b in zip(two, three, strict=True):
        if a.shape == b.shape and a.kept == b.kept:
            found.append(0)
        elif a.shape[1:] == b.shape[1:] and a.kept == b.kept and a.shape[0] * 3 == b.shape[0] * 2:
            if a.sums is not None and b.sums is not None and not torch.allclose(a.sums, b.sums[:, :2], rtol=1e-3):
                return None  # rows of a sample do not lie together
            found.append(a.shape[0] // 2)
        else:
            return None
    return tuple(found)


def _next(module: nn.Module, parameter: str, alone: Collection[str]) -> str:
    """Of the modules around a parameter, the innermost that does not run apart yet: the model itself does not."""
    owner = parameter.rpartition(".")[0]
    while owner in alone and owner:
        owner = owner.rpartition(".")[0]
    return owner


def _some_parameter(module: nn.Module, name: str) -> str:
    names = (key for key, _ in module.get_submodule(name).named_parameters())
    return f"{name}.{next(names)}" if name else next(names)


def _few(args: Any, named: Any, batch: int, count: int) -> Any:
    at = [i % batch for i in range(count)]
    return tree_map_only(Tensor, lambda x: x[at] if x.ndim else x, (args, named))


def _differs(got: Any, want: Any) -> str:
    ours, theirs = tree_leaves(got), tree_leaves(want)
    if len(ours) != len(theirs):
        return "its output has other parts"
    for x, y in zip(ours, theirs, strict=True):
        if not isinstance(y, Tensor):
            continue
        if not isinstance(x, Tensor) or x.shape != y.shape:
            return f"an output has shape {list(getattr(x, 'shape', []))}, sample by sample {list(y.shape)}"
        if x.dtype != y.dtype:
            return f"an output is of {x.dtype}, sample by sample of {y.dtype}"
        if not torch.equal(x.isnan(), y.isnan()):
            return "an output has NaN in other places"
        other = (x != y) & ~y.isnan()
        if not other.any():
            continue
        if not (y.is_floating_point() or y.is_complex()):
            return f"an output of {y.dtype} has {int(other.sum())} other values"
        most = torch.where(y.isfinite(), y, 0).abs().max().item()
        apart = (x - y)[other].abs().max().item()  # infinite where one of them alone is
        if apart > TOLERANCE.get(y.dtype, 0.05) * max(most, 1e-30):
            return f"an output is {apart:.1e} off, of {most:.1e}"
    return ""


@contextmanager
def _settled(module: nn.Module) -> Iterator[None]:
    """Within: no gradients, and no part trains."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _state(module: nn.Module, args: Any, named: Any) -> Hashable:
    """Whatever may change what a module does with its parameters: its parts, their settings, what it is given."""
    parts = tuple(
        (id(part), type(part), tuple((key, x) for key, x in vars(part).items() if type(x) in (int, float, bool, str)))
        for part in module.modules()
    )
    config = getattr(module, "config", None)
    given = tuple(
        (tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else repr(x) for x in tree_leaves((args, named))
    )
    return parts, repr(vars(config)) if hasattr(config, "__dict__") else "", given, tuple(named)
