"""Task vectors: what finetuning added to a base, by parameter; arithmetic, low rank, files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.artifacts import save_tensors
from engine.weights.parameters import Blocks, blocks_of
from models.reading import read_int
from models.shapes import Float, Integer

# left [vectors, rows, rank] and right [vectors, rank, columns]: a difference is their product.
Factors: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TaskVectors:
    """Differences of T finetuned models to one base, by parameter: what `engine.weights.task_vectors` gives.

    base:    the base's name.
    names:   of the vectors, all different.
    shapes:  of the parameters, by name, in the model's order; tied ones once.
    tensors: [T, *shape] by parameter.
    factors: in place of that, of parameters of low rank: [T, rows, rank] and [T, rank, columns].
    error:   of each vector, the share of its norm (Frobenius, all parameters) that low rank left out; empty if whole,
             and of sums, where it is not known.

    `a + b` adds vector by vector, `-a` negates, `0.5 * a` scales, `a["name"]` takes one; `in` and loops go by name.

    >>> base, tuned = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> vectors = engine.weights.task_vectors(base, tuned, names=["tuned"])
    >>> (0.5 * -vectors).names
    ('0.5 * -tuned',)
    """

    base: str
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Factors] = field(default_factory=dict)
    error: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __repr__(self) -> str:
        said = f"; low rank leaves out {', '.join(f'{e:.1%}' for e in self.error)} of the norm" if self.error else ""
        return f"TaskVectors({', '.join(self.names)}; of {self.base!r}, {len(self.shapes)} parameters{said})"

    def __getitem__(self, name: str) -> TaskVectors:
        """One vector by its name. Raises KeyError for a name that is none of these."""
        if name not in self.names:
            raise KeyError(f"no vector {name!r}: expected one of {list(self.names)}")
        at = self.names.index(name)
        tensors, factors = self._each(lambda x: x[at : at + 1], lambda left, right: (left[[at]], right[[at]]))
        return TaskVectors(self.base, (name,), self.shapes, tensors, factors, self.error[at : at + 1])

    def __mul__(self, by: float | int) -> TaskVectors:
        if isinstance(by, bool) or not isinstance(by, Real) or not math.isfinite(by):
            raise TypeError(f"task vectors are scaled by a finite number, got {by!r:.80}")
        tensors, factors = self._each(lambda x: x * by, lambda left, right: (left * by, right))
        names = tuple(f"{by:g} * {name}" for name in self.names)
        return replace(self, names=names, tensors=tensors, factors=factors)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVectors:
        return replace(self * -1.0, names=tuple(f"-{name}" for name in self.names))

    def __add__(self, other: TaskVectors) -> TaskVectors:
        """Vector by vector. Raises ValueError for vectors of other parameters, or another number of them."""
        if not isinstance(other, TaskVectors):
            raise TypeError(f"task vectors are added to task vectors, got {type(other).__name__}")
        if len(other) != len(self) or dict(other.shapes) != dict(self.shapes):
            raise ValueError(f"expected as many vectors of the same parameters: got {self!r} and {other!r}")
        both = [name for name in self.factors if name in other.factors]
        tensors = {name: self.whole(name) + other.whole(name) for name in self.shapes if name not in both}
        joined = {name: tuple(zip(self.factors[name], other.factors[name], strict=True)) for name in both}
        factors = {name: (torch.cat(left, dim=2), torch.cat(right, dim=1)) for name, (left, right) in joined.items()}
        names = tuple(f"{a} + {b}" for a, b in zip(self.names, other.names, strict=True))
        return TaskVectors(self.base, names, self.shapes, tensors, factors)

    def __sub__(self, other: TaskVectors) -> TaskVectors:
        return self + -other

    def whole(self, name: str) -> Float[Tensor, "vectors ..."]:
        """The differences of one parameter, multiplied out where they are of low rank."""
        return self.tensors[name] if name in self.tensors else torch.bmm(*self.factors[name])

    def blocks(self, blocks: Blocks = "parameter") -> list[str]:
        """Names of what has a coefficient, in the order of coefficients: "parameter" (default), "layer", "model".

        A layer is what parameters' names have in common up to their first number; without one, their module.

        Raises ValueError for another kind.

        >>> vectors = engine.weights.task_vectors(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
        >>> vectors.blocks(), vectors.blocks("model")
        (['weight', 'bias'], ['model'])
        """
        return list(dict.fromkeys(blocks_of(self.shapes, blocks)))

    def low_rank(self, rank: Integer) -> TaskVectors:
        """The nearest vectors whose matrices have this rank; what that leaves out is their `error`.

        rank: of the difference of every matrix; narrower ones, and all that are not matrices, stay whole.

        What full finetuning adds is not of low rank in norm: look at `error`, and at what the model then does.

        Raises ValueError for a rank that is no positive integer, and for vectors that are of low rank already.

        Source: Eckart and Young: the largest singular values and their vectors.

        >>> base, tuned = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        >>> 0 < engine.weights.task_vectors(base, tuned).low_rank(2).error[0] < 1
        True
        """
        rank = read_int(rank, "rank")
        if self.factors:
            raise ValueError(f"the vectors are of low rank already: {self!r}; expected whole ones")
        chosen = [name for name, shape in self.shapes.items() if len(shape) == 2 and min(shape) > rank]
        factors, left_out = {}, torch.zeros(len(self), dtype=torch.float64)
        norms = sum(x.double().flatten(1).square().sum(dim=1) for x in self.tensors.values())
        for name in chosen:
            whole = self.tensors[name]
            u, s, v = torch.linalg.svd(whole if whole.dtype == torch.float64 else whole.float(), full_matrices=False)
            left, right = u[..., :rank] * s[:, None, :rank], v[:, :rank]
            factors[name] = left.to(whole.dtype).contiguous(), right.to(whole.dtype).contiguous()
            left_out += s[:, rank:].double().square().sum(dim=1).cpu()
        error = (left_out / torch.as_tensor(norms).cpu().clamp_min(1e-300)).sqrt()
        tensors = {name: x for name, x in self.tensors.items() if name not in factors}
        return replace(self, tensors=tensors, factors=factors, error=tuple(error.tolist()))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> TaskVectors:
        """The same vectors on another device, or in another dtype: those of the model that they are added to.

        >>> engine.weights.task_vectors(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)).to(dtype=torch.float64).names
        ('Linear',)
        """
        tensors, factors = self._each(
            lambda x: x.to(device, dtype), lambda left, right: (left.to(device, dtype), right.to(device, dtype))
        )
        return replace(self, tensors=tensors, factors=factors)

    def save(self, path: str | Path) -> None:
        """Write all to one safetensors file, whole or not at all. Raises OSError if it cannot be written."""
        metadata: dict[str, Any] = {"base": self.base, "vectors": self.names, "error": self.error}
        metadata["shapes"] = dict(self.shapes)
        factors = {f"{side}:{name}": x for name, pair in self.factors.items() for side, x in zip(SIDES, pair)}  # noqa: B905
        save_tensors(path, {f"whole:{name}": x for name, x in self.tensors.items()} | factors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> TaskVectors:
        """Read saved vectors. Raises FileNotFoundError, or ValueError for a file that is broken or of something else.

        >>> engine.weights.task_vectors(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)).save("vectors.safetensors")
        >>> engine.weights.TaskVectors.load("vectors.safetensors").base
        'Linear'
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {})["headpatch"])
                held = set(file.keys())
                shapes = {name: tuple(shape) for name, shape in said["shapes"].items()}
                tensors = {name: file.get_tensor(f"whole:{name}") for name in shapes if f"whole:{name}" in held}
                low = [name for name in shapes if name not in tensors]
                factors = {name: tuple(file.get_tensor(f"{side}:{name}") for side in SIDES) for name in low}
                return cls(said["base"], tuple(said["vectors"]), shapes, tensors, factors, tuple(said["error"]))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is truncated, or not a file of task vectors: {error}") from error

    def _each(self, whole: Any, low: Any) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        tensors = {name: whole(x) for name, x in self.tensors.items()}
        return tensors, {name: low(*pair) for name, pair in self.factors.items()}


SIDES = ("left", "right")
