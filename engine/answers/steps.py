"""Which tokens of an answer are patched, and with what: step 0 is the last token of the prompt, s the s-th new one."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from engine.core.patches import Heads, Mode, Patch, Steering, Values, read_patch, read_positions
from models import Model
from models.reading import as_int, read_tensor

# "prompt": the last prompt token only; "all": every new token too; n: the first n new ones too; a list: these steps.
Patched: TypeAlias = "Literal['prompt', 'all'] | int | Sequence[int] | Tensor"
WITHOUT_END = 2**62


@dataclass(frozen=True)
class Steps:
    """A patch of the tokens of an answer.

    patch:   of step 0, or of all patched steps if they carry the same.
    patched: the patched steps. by_step: what each step carries, if that differs: [steps, ...] of `patch.values`.

    >>> Steps(patch, range(2)).at(5) is None
    True
    """

    patch: Patch
    patched: Container[int]
    by_step: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return self.patch.n_rows

    def select(self, rows: Sequence[int]) -> Steps:
        """These rows, in this order."""
        by_step = self.by_step
        if by_step is not None and by_step.ndim == 5:
            by_step = by_step[:, list(rows)]
        return Steps(self.patch.select(rows), self.patched, by_step)

    def at(self, step: int) -> Patch | None:
        """What is patched at a step; None for nothing."""
        if step not in self.patched:
            return None
        return self.patch if self.by_step is None else replace(self.patch, values=self.by_step[step])


def read_steps(
    model: Model,
    heads: Heads,
    values: Values,
    mode: Mode,
    steering: Steering | None,
    patched: Patched,
    by_step: bool = False,
    longest: int = WITHOUT_END,
) -> Steps:
    """Check what a caller gave; longest: the number of steps there will be at most.

    by_step: the first axis of values is the steps': [steps, L, H, D], or [steps, rows, L, H, D]; "all" are those.

    Raises as `read_patch`; ValueError for steps that no token will be computed at, or that values are missing for.
    """
    each: list[Any] = [values]
    if by_step:
        values = read_tensor(values, "values")
        if not isinstance(values, Tensor) or values.ndim not in (4, 5) or not len(values):
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"values by step must be [steps, L, H, D] or [steps, rows, L, H, D], got {got}")
        each = list(values)
    patches = [read_patch(model, heads, one, -1, mode, steering) for one in each]
    steps = _read_patched(patched, len(each) if by_step else longest)
    last = steps[-1] if isinstance(steps, range) else max(steps)
    if by_step and last >= len(each):
        raise ValueError(f"step {last} is patched, but values are given for {len(each)} steps: 0..{len(each) - 1}")
    if last >= longest:
        raise ValueError(
            f"patched={patched!r} asks for step {last}, but an answer of {longest} tokens has the steps "
            f"0..{longest - 1}: 0 is the last prompt token, and the last new token is not run"
        )
    return Steps(patches[0], steps, torch.stack([one.values for one in patches]) if by_step else None)


def _read_patched(patched: Patched, longest: int) -> Any:
    if isinstance(patched, str):
        if patched not in ("prompt", "all"):
            raise ValueError(f"patched must be 'prompt', 'all', a number of new tokens or a list of steps: {patched!r}")
        return range(1 if patched == "prompt" else longest)
    if (n := as_int(patched)) is not None:
        if n < 0:
            raise ValueError(f"patched must be a number of new tokens from 0 on, got {n}")
        return range(n + 1)
    steps = read_positions(patched)
    if min(steps) < 0:
        raise ValueError(f"steps count from the last prompt token, which is 0: got {list(steps)}")
    return frozenset(steps)
