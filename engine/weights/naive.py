"""The definition of right: merge and run, sample by sample."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from engine.weights.parameters import Blocks, places, root_of, swapped
from engine.weights.reading import Composition, check_independent, read_composition, read_inputs
from engine.weights.vectors import TaskVectors
from models import Model, UnsupportedModelError
from models.shapes import Float


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
    """Each sample by itself, the answers below each other."""
    found = []
    for at in range(len(composition.coefficients)):
        mine, own = tree_map_only(Tensor, partial(_row, at), (args, named))
        found.append(run(module, mine, own, composition.sample(at)))
    return joined(found)


def _row(at: int, x: Tensor) -> Tensor:
    return x[at : at + 1]


def run(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], one: Composition) -> Any:
    """Not by `functional_call`, after which recurrent modules go on with the weights that they were lent."""
    with swapped(places(module), {name: one.merged(name) for name in one.base}):
        return module(*args, **named)


def joined(answers: list[Any]) -> Any:
    """Answers of single samples, below each other: tensors, or whatever holds tensors.

    Raises UnsupportedModelError for a number that belongs to no sample: a loss, say.
    """
    flat, spec = zip(*(tree_flatten(answer) for answer in answers), strict=True)
    whole = []
    for leaves in zip(*flat, strict=True):
        if isinstance(leaves[0], Tensor) and not leaves[0].ndim:
            raise UnsupportedModelError("the model gives a number for the whole batch: give no labels, ask for no loss")
        whole.append(torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0])
    return tree_unflatten(whole, spec[0])
