"""What a caller of `engine.weights` gives, checked in full before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from engine.weights.parameters import Blocks, blocks_of, check_plain, name_of, root_of
from engine.weights.vectors import TaskVectors
from models.reading import read_tensor
from models.shapes import Float


@dataclass(frozen=True)
class Composition:
    """theta_b = theta_0 + sum_t c[b, t, block] tau_t, by parameter.

    base: the base's parameters, apart from their gradients. block: of each parameter.
    """

    base: Mapping[str, Tensor]
    vectors: TaskVectors
    coefficients: Float[Tensor, "*batch vectors blocks"]
    block: Mapping[str, int]

    def of(self, name: str) -> Float[Tensor, "*batch vectors"]:
        """Coefficients of a parameter."""
        return self.coefficients[..., self.block[name]].to(self.base[name])

    def merged(self, name: str) -> Float[Tensor, "*batch *shape"]:
        """theta, of one sample or for each."""
        c, tau = self.of(name), self.vectors.whole(name)
        return self.base[name] + torch.tensordot(c, tau, dims=1)

    def sample(self, at: int) -> Composition:
        return Composition(self.base, self.vectors, self.coefficients[at], self.block)


def read_composition(
    model: Any, vectors: Any, coefficients: Any, blocks: Blocks, batched: bool | None = None
) -> Composition:
    """Raises TypeError, ValueError or UnsupportedModelError naming what was given and what was expected.

    batched: coefficients must have a first axis of samples, or must not; None: either.
    """
    module, name = root_of(model), name_of(model)
    if not isinstance(vectors, TaskVectors):
        raise TypeError(f"vectors must be engine.weights.TaskVectors, got {type(vectors).__name__}")
    check_plain(module, name)
    base = {key: p.detach() for key, p in module.named_parameters()}
    if base.keys() != vectors.shapes.keys():
        missing = [key for key in base if key not in vectors.shapes]
        more = [key for key in vectors.shapes if key not in base]
        said = f"they lack {missing[:3]}" if missing else f"the model has no {more[:3]}"
        raise ValueError(f"the vectors are of {vectors.base!r} and do not fit {name}: {said}")
    for key, p in base.items():
        if vectors.shapes[key] != tuple(p.shape):
            expected, got = list(p.shape), list(vectors.shapes[key])
            raise ValueError(f"{key} has shape {expected} in {name}, and {got} in the vectors (of {vectors.base!r})")
        held = vectors.tensors[key] if key in vectors.tensors else vectors.factors[key][0]
        if held.device != p.device or held.dtype != p.dtype:
            raise ValueError(
                f"{key} is {p.dtype} on {p.device}, the vectors are {held.dtype} on {held.device}: vectors.to(...)"
            )
    names = vectors.blocks(blocks)
    index = {block: i for i, block in enumerate(names)}
    c = _read_coefficients(coefficients, len(vectors), names, blocks, batched)
    block = dict(zip(vectors.shapes, (index[b] for b in blocks_of(vectors.shapes, blocks)), strict=True))
    return Composition(base, vectors, c.to(next(iter(base.values())).device), block)


def _read_coefficients(given: Any, count: int, names: Sequence[str], blocks: str, batched: bool | None) -> Tensor:
    ways = {True: "[batch, {}, {}]", False: "[{}, {}]", None: "[{0}, {1}] or [batch, {0}, {1}]"}
    wanted = f"coefficients must be {ways[batched].format(count, len(names))}, vectors x {blocks} blocks"
    c = read_tensor(given, "coefficients")
    if not isinstance(c, Tensor) or not c.is_floating_point():
        got = str(c.dtype) if isinstance(c, Tensor) else type(c).__name__
        raise TypeError(f"{wanted}, a floating-point tensor: got {got}")
    dims = {True: (3,), False: (2,), None: (2, 3)}[batched]
    if c.ndim not in dims or list(c.shape[-2:]) != [count, len(names)] or not c.numel():
        raise ValueError(f"{wanted}: got {list(c.shape)}")
    if not c.isfinite().all():
        at = (~c.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{wanted}, all finite: got {c[tuple(at)].item()} at {at}")
    return c


def read_inputs(model: Any, inputs: Any, batch: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of the model's forward. batch: samples, each a row of every tensor."""
    module = root_of(model)
    if isinstance(inputs, np.ndarray):
        inputs = read_tensor(inputs, "inputs")
    args: tuple[Any, ...]
    if isinstance(inputs, Tensor):
        args, named = (inputs,), {}
    elif isinstance(inputs, Mapping) and inputs and all(isinstance(key, str) for key in inputs):
        args = ()
        named = {k: tree_map_only(np.ndarray, partial(read_tensor, what=f"input {k!r}"), x) for k, x in inputs.items()}
    else:
        raise TypeError(
            f"inputs must be a tensor, or the forward's arguments by name, got {type(inputs).__name__}: {inputs!r:.80}"
        )
    accepted = inspect.signature(module.forward).parameters
    if named.get("past_key_values") is not None or named.get("use_cache"):
        raise ValueError("inputs with a cache are not taken: its keys would belong to other weights")
    if "use_cache" in accepted:
        named["use_cache"] = False
    if batch is not None:
        given = {**dict(enumerate(args)), **named}.items()
        shapes = [(key, list(x.shape)) for key, part in given for x in tree_leaves(part) if isinstance(x, Tensor)]
        wrong = [(key, shape) for key, shape in shapes if shape[:1] != [batch]]
        if wrong or not shapes:
            got = f"input {wrong[0][0]!r} of shape {wrong[0][1]}" if wrong else "no tensor among the inputs"
            raise ValueError(f"coefficients are of {batch} samples, each a row of every input: got {got}")
    return args, named


def check_independent(module: nn.Module) -> None:
    """Raises ValueError for batch norm that takes its statistics from the batch: samples would see each other; and for
    autocast, which does not reach products with weights of each sample's own.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ValueError("weights of each sample's own do not go with torch.autocast: expected a model of that dtype")
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is batch norm that takes statistics of the batch, in which samples of other "
                "weights would see each other: expected model.eval() and running statistics"
            )
