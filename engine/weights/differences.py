"""What finetuning added: parameters of finetuned models less those of their base, checked for one architecture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.weights.parameters import aliases, check_dense, check_plain, name_of, root_of
from engine.weights.vectors import TaskVectors
from models import Model


@torch.no_grad()
def task_vectors(
    base: nn.Module | Model,
    *finetuned: nn.Module | Model | Mapping[str, Tensor],
    names: Sequence[str] | None = None,
) -> TaskVectors:
    """What each finetuned model adds to the base, by parameter: theta_t - theta_0.

    base:      any module, or a model of `models.load`.
    finetuned: such models of the base's architecture, or their state dicts; one at least.
    names:     of the vectors; default the models' names, numbered where they are the same.

    Tied parameters (an embedding that is the vocabulary projection) are one parameter, and one block. Buffers, such as
    the running statistics of batch norm, are no parameters: composed models keep the base's, and a warning says so
    where a finetuned model has others.

    Returns `TaskVectors` on the base's device, in its dtypes. Raises TypeError for what is no model; ValueError for
    parameters that are missing, or more, or of other shapes, that are not finite, or that are tied in the base and two
    in the finetuned model; UnsupportedModelError for quantised weights.

    Source: Editing Models with Task Arithmetic (arXiv 2212.04089), section 2.

    >>> base, tuned = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> engine.weights.task_vectors(base, tuned, names=["tuned"])
    TaskVectors(tuned; of 'Linear', 2 parameters)
    """
    module = root_of(base)
    check_plain(module, f"the base {name_of(base)}")
    ours = dict(module.named_parameters())
    if not ours:
        raise ValueError(f"the base {name_of(base)} has no parameters: expected a model with weights")
    if not finetuned:
        raise ValueError("no finetuned model was given: expected at least one beside the base")
    called = _names(finetuned, names)
    theirs = [_read(module, one, name) for one, name in zip(finetuned, called, strict=True)]
    tensors = {name: _differences(p, [one[name] for one in theirs]) for name, p in ours.items()}
    shapes = {name: tuple(p.shape) for name, p in ours.items()}
    return TaskVectors(name_of(base), called, shapes, tensors)


def _names(finetuned: Sequence[Any], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is not None:
        given = [names] if isinstance(names, str) else list(names)
        if len(given) != len(finetuned) or len({*given}) != len(given) or not all(isinstance(n, str) for n in given):
            raise ValueError(
                f"names must be {len(finetuned)} different texts, one a finetuned model, got {names!r:.80}"
            )
        return tuple(given)
    found = ["state dict" if isinstance(one, Mapping) else name_of(one) for one in finetuned]
    return tuple(name if found.count(name) == 1 else f"{name} {i}" for i, name in enumerate(found, start=1))


def _read(base: nn.Module, one: Any, name: str) -> dict[str, Tensor]:
    """Parameters of a finetuned model by the base's first names for them."""
    if isinstance(one, Mapping):
        given: dict[str, Any] = dict(one)
    else:
        check_plain(root_of(one), name)
        given = {**dict(root_of(one).named_buffers()), **dict(root_of(one).named_parameters(remove_duplicate=False))}
    known, buffers = aliases(base), dict(base.named_buffers())
    theirs = {key: x for key, x in given.items() if key not in buffers or key in known}
    if not isinstance(one, Mapping):
        theirs = {key: x for key, x in theirs.items() if not any(x is buffer for buffer in root_of(one).buffers())}
    have = {known[key] for key in theirs if key in known}
    if missing := [first for first in dict.fromkeys(known.values()) if first not in have]:
        raise ValueError(f"{name} has no {_some(missing)}, which the base has: expected the same architecture")
    if extra := [key for key in theirs if key not in known]:
        raise ValueError(f"{name} has {_some(extra)}, which the base has not: expected the same architecture")
    found: dict[str, Tensor] = {}
    shapes = {key: p.shape for key, p in base.named_parameters()}
    for key, tensor in theirs.items():
        first = known[key]
        check_dense(key, tensor, name)
        if tensor.shape != shapes[first]:
            raise ValueError(f"{name}: {key} has shape {list(tensor.shape)}, in the base {list(shapes[first])}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: {key} has numbers that are NaN or infinite: expected finite weights")
        if first in found and found[first] is not tensor and not torch.equal(found[first], tensor):
            tied = [other for other in known if known[other] == first]
            raise ValueError(
                f"{name} edits {' and '.join(tied)} apart, which are tied in the base: one parameter, and one block. "
                "Untie them in the base first"
            )
        found[first] = tensor
    other = [key for key, x in buffers.items() if key in given and not _same(x, given[key])]
    if other:
        warnings.warn(f"{name} has other buffers, {_some(other)}: composed models keep the base's", stacklevel=3)
    return found


def _same(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and one.shape == other.shape and bool((one == other.to(one.device)).all())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(ours: Tensor, theirs: Sequence[Tensor]) -> Tensor:
    """In the wider of the two dtypes, then rounded to the base's."""
    found = ours.new_empty(len(theirs), *ours.shape)
    for at, tensor in enumerate(theirs):
        wide = torch.promote_types(ours.dtype, torch.float32)
        found[at] = tensor.to(ours.device, wide) - ours.to(wide)
    return found
