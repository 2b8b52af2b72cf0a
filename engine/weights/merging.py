"""One merge: while it lasts, the model has the composed weights, for whatever runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.weights.parameters import Blocks, places, root_of, swapped
from engine.weights.reading import Composition, read_composition
from engine.weights.vectors import TaskVectors
from models import Model
from models.shapes import Float


@contextmanager
def merged(
    model: nn.Module | Model,
    vectors: TaskVectors,
    coefficients: Float[Tensor, "vectors blocks"],
    *,
    blocks: Blocks = "parameter",
) -> Iterator[None]:
    """Within: the model's weights are theta_0 + sum_t c[t, block] tau_t; afterwards its own again, also after an error.

    model:        any module, or a model of `models.load`: all verbs run it with the merged weights.
    coefficients: of each vector, for each block; `vectors.blocks(blocks)` names them. With gradients, if they have any.
    blocks:       what shares a coefficient: "parameter" (default), "layer", "model".

    Takes the memory of one more set of weights. The model's own parameters are neither changed nor given gradients.
    Other threads that use the model meanwhile see the merged weights.

    Raises TypeError, ValueError or UnsupportedModelError, before anything is merged, for what does not fit.

    >>> vectors = engine.weights.task_vectors(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
    >>> with engine.weights.merged(base := torch.nn.Linear(2, 3), vectors, torch.zeros(1, 2)):
    ...     base(torch.ones(1, 2)).shape
    torch.Size([1, 3])
    """
    composition = read_composition(model, vectors, coefficients, blocks, batched=False)
    with held(root_of(model), composition):
        yield


@contextmanager
def held(module: nn.Module, composition: Composition) -> Iterator[None]:
    """Within: the module's weights are those of a composition without samples."""
    graph = torch.is_grad_enabled() and composition.coefficients.requires_grad
    found = places(module)
    with torch.set_grad_enabled(graph):
        tensors = {name: composition.merged(name) for name in found}
    if not graph:  # as the model's own, for those who look at the class
        tensors = {name: nn.Parameter(x, requires_grad=False) for name, x in tensors.items()}
    with swapped(found, tensors):
        yield
