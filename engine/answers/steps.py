"""Which tokens of an answer are patched, and with what: step 0 is the last token of the prompt, s the s-th new one."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from engine.core.edits import Tokens
from engine.core.patches import Change, Heads, Mode, One, Patches, Values
from engine.core.reading import read_patches, read_positions
from models import Model
from models.reading import as_int, read_tensor

# "prompt": the last prompt token only; "all": every new token too; n: the first n new ones too; a list: these steps.
Patched: TypeAlias = "Literal['prompt', 'all'] | int | Sequence[int] | Tensor"
WITHOUT_END = 2**62


@dataclass(frozen=True)
class Steps:
    """Patches of a prompt and of the tokens of its answer: what is at position -1 is at the patched steps.

    patched: the patched steps. by_step: what the last of the patches carries at each, if that differs: [steps, ...] of
             its values.

    >>> Steps(patch, range(2)).placed(n_prompt=5, first=6, n_tokens=3)[0][1]
    []
    """

    patch: Patches
    patched: Container[int]
    by_step: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return self.patch.n_rows

    def select(self, rows: Sequence[int]) -> Steps:
        """These rows, in this order."""
        by_step = self.by_step
        if by_step is not None and by_step.shape[1] > 1:
            by_step = by_step[:, list(rows)]
        return Steps(self.patch.select(rows), self.patched, by_step)

    def first(self, n_prompt: int) -> int:
        """The first token of a prompt that rows differ at: its last one at most."""
        return min(*self.patch.at(n_prompt), n_prompt - 1)

    @property
    def alone(self) -> bool:
        """Whether prompts are asked one by one: what is patched in them depends on their length."""
        return self.patch.by_prompt or any(change.positions != (-1,) for change in self.patch.each)

    def placed(self, n_prompt: int, first: int, n_tokens: int) -> list[tuple[Change, Tokens]]:
        """What is done to tokens [first, first + n_tokens) of a prompt of `n_prompt` tokens and its answer."""
        last = n_prompt - 1
        found: list[tuple[Change, Tokens]] = []
        steps = [s for s in range(max(0, first - last), first + n_tokens - last) if s in self.patched]
        for number, change in enumerate(self.patch.each):
            at = {token: p for p, token in enumerate(change.at(n_prompt))}
            here = [(token - first, p) for token, p in at.items() if first <= token < min(last, first + n_tokens)]
            answer = [(last + s - first, at[last]) for s in steps] if last in at else []
            if self.by_step is None or number < len(self.patch.each) - 1:
                found.append((change, sorted(here + answer)))
                continue
            for step, token in zip(steps, answer, strict=True):
                found.append((replace(change, values=self.by_step[step]), [token]))
        return found


def read_steps(
    model: Model,
    patches: One | Sequence[One] | None,
    heads: Heads,
    values: Values,
    mode: Mode,
    patched: Patched,
    by_step: bool = False,
    longest: int = WITHOUT_END,
) -> Steps:
    """Check what a caller gave; longest: the number of steps there will be at most.

    by_step: the first axis of values is the steps': [steps, L, H, D], or [steps, rows, L, H, D]; "all" are those.

    Raises as `read_patches`; ValueError for steps that no token will be computed at, or that values are missing for,
    and for attention of new tokens, which are not those that values are given for.
    """
    each: list[Any] = [values]
    if by_step:
        values = read_tensor(values, "values")
        if not isinstance(values, Tensor) or values.ndim not in (4, 5) or not len(values):
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"values by step must be [steps, L, H, D] or [steps, rows, L, H, D], got {got}")
        each = list(values)
    read = [read_patches(model, patches, heads, one, -1, mode) for one in each]
    steps = _read_patched(patched, len(each) if by_step else longest)
    last = steps[-1] if isinstance(steps, range) else max(steps)
    if by_step and last >= len(each):
        raise ValueError(f"step {last} is patched, but values are given for {len(each)} steps: 0..{len(each) - 1}")
    if last >= longest:
        raise ValueError(
            f"patched={patched!r} asks for step {last}, but an answer of {longest} tokens has the steps "
            f"0..{longest - 1}: 0 is the last prompt token, and the last new token is not run"
        )
    if last and (odd := [c.site for c in read[0].each if c.values is not None and c.site in ("scores", "pattern")]):
        raise ValueError(f"values of {odd[0]} are of the prompt's tokens, new tokens see more: patched='prompt'")
    stacked = torch.stack([one.each[-1].values for one in read]) if by_step else None  # type: ignore[misc]
    return Steps(read[0], steps, stacked)


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
