"""The definition of right: merge and run, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from engine.weights.parameters import Blocks, places, root_of, swapped
from engine.weights.reading import Composition, check_independent, read_composition, read_inputs
from engine.weights.vectors import TaskVectors
from models import Model, UnsupportedModelError
from models.shapes import Float

# Which dimension of each output is samples; -1: none.
Dims: TypeAlias = tuple[int, ...]


def forward(
    model: nn.Module | Model,
    inputs: Any,
    vectors: TaskVectors,
    coefficients: Float[Tensor, "*batch vectors blocks"],
    *,
    blocks: Blocks = "parameter",
) -> Any:
    """As `engine.weights.forward`, by one merge and one forward for each sample.

    >>> vectors = engine.weights.task_vectors(base := torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
    >>> engine.weights.naive.forward(base, torch.ones(4, 2), vectors, torch.ones(4, 1, 2)).shape
    torch.Size([4, 3])
    """
    composition = read_composition(model, vectors, coefficients, blocks)
    batch = len(composition.coefficients) if composition.coefficients.ndim == 3 else None
    args, named = read_inputs(model, inputs, batch)
    if batch is None:
        return run(root_of(model), args, named, composition)
    check_independent(root_of(model))
    return rows(root_of(model), args, named, composition)


def rows(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], composition: Composition) -> Any:
    """Each sample by itself, their answers joined."""
    found = []
    for at in range(len(composition.coefficients)):
        mine, own = tree_map_only(Tensor, partial(_row, at), (args, named))
        found.append(run(module, mine, own, composition.sample(at)))
    return joined(found, dims(module, args, named, composition) if len(found) > 1 else None)


def _row(at: int, x: Tensor) -> Tensor:
    return x[at : at + 1]


def _first(count: int, x: Tensor) -> Tensor:
    return x[[0] * count]


def run(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], one: Composition) -> Any:
    """Not by `functional_call`, after which recurrent modules go on with the weights that they were lent."""
    with swapped(places(module), {name: one.merged(name) for name in one.base}):
        return module(*args, **named)


def dims(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], composition: Composition) -> Dims:
    """Which dimension of each output is samples: that which grows from one sample to that sample twice.

    Raises UnsupportedModelError where that cannot be told.
    """
    devices = {p.device for p in composition.base.values() if p.is_cuda}
    seen = []
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        for count in (1, 2):
            mine, own = tree_map_only(Tensor, partial(_first, count), (args, named))
            seen.append(shapes(run(module, mine, own, composition.sample(0))))
    found = grown(seen[0], seen[1], 1, 2)
    if found is None:
        said = f"its outputs are {seen[0]} for one sample, {seen[1]} for two"
        raise UnsupportedModelError(f"{said}: expected one dimension of each to be samples")
    return found


def shapes(answer: Any) -> list[tuple[int, ...] | None]:
    """Of each output; None for what is no tensor."""
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(answer)]


def grown(few: Sequence[Any], more: Sequence[Any], n: int, m: int) -> Dims | None:
    """The dimension of each output that grows from n samples to m, -1 if none does; None if that cannot be told."""
    if len(few) != len(more):
        return None
    found = []
    for one, other in zip(few, more, strict=True):
        if one == other:
            found.append(-1)
            continue
        if one is None or other is None or len(one) != len(other):
            return None
        wider = [dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if len(wider) > 1 or one[wider[0]] * m != other[wider[0]] * n:
            return None
        found.append(wider[0])
    return tuple(found)


def joined(answers: list[Any], dims: Dims | None) -> Any:
    """Answers of single samples beside each other in their dimensions of samples: tensors, or whatever holds tensors.

    Raises UnsupportedModelError for what belongs to no sample and is not the same for all: a loss, say.
    """
    if dims is None:
        return answers[0]
    flat, spec = zip(*(tree_flatten(answer) for answer in answers), strict=True)
    if any(len(leaves) != len(dims) for leaves in flat):
        raise UnsupportedModelError(f"samples have other outputs: {sorted({len(leaves) for leaves in flat})} of them")
    whole = []
    for dim, leaves in zip(dims, zip(*flat, strict=True), strict=True):
        if isinstance(leaves[0], Tensor) and not leaves[0].ndim:
            raise UnsupportedModelError("the model gives a number for the whole batch: give no labels, ask for no loss")
        if dim >= 0:
            whole.append(torch.cat(leaves, dim))
            continue
        if not all(_same(leaf, leaves[0]) for leaf in leaves):
            said = f"a tensor of {list(leaves[0].shape)}" if isinstance(leaves[0], Tensor) else repr(leaves[0])[:80]
            raise UnsupportedModelError(f"an output has no dimension of samples, and is another for each: {said}")
        whole.append(leaves[0])
    return tree_unflatten(whole, spec[0])


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and torch.equal(x, y)
    return x == y if isinstance(x, (bool, int, float, str)) else type(x) is type(y)
