"""A patched prompt handed over to transformers' own `generate`: sampling, beams, streaming, constraints are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from engine.checking import able
from engine.intervention import Heads, Mode, Patch, Steering, Values
from engine.prefix import Prefix, as_prefixes, compute, patched_positions, why_not_split
from engine.runner import make_edit, make_steer
from engine.steps import Patched, Steps, read_steps
from models import Edit, KeyValues, Model, PromptLike, Steer, UnsupportedModelError
from models.handing import edit_forwards_with, hand_over, why_not_handed
from models.huggingface import HuggingFace
from models.reading import read_int
from models.shapes import Integer


@dataclass(frozen=True)
class Start(Mapping[str, Any]):
    """What transformers' `generate` is given, `generate(**start)`: once, as it writes to the cache.

    `copy.deepcopy(start)`, made before, can be gone on from too.
    """

    given: Mapping[str, Any]
    n_cached: int

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def __len__(self) -> int:
        return len(self.given)

    def __iter__(self) -> Iterator[str]:
        if (n_tokens := self.given["past_key_values"].get_seq_length()) != self.n_cached:
            raise ValueError(
                f"this start was gone on from already: its cache holds {n_tokens} tokens, not {self.n_cached}; "
                "make another, or copies by copy.deepcopy(start) before the first generate"
            )
        return iter(self.given)


@torch.no_grad()
def start(
    model: Model,
    prompt: PromptLike | Prefix,
    *,
    heads: Heads = None,
    values: Values = None,
    mode: Mode = "replace",
    steering: Steering | None = None,
    patched: Patched = "prompt",
    copies: Integer = 1,
) -> Start:
    """What transformers' own `generate` goes on from, patched: it chooses every new token, by all that it can do.

    heads, values, mode, steering: as for `engine.patch`; R rows are R texts of the batch.
    patched: "prompt", the last prompt token only; "all": every new token too; n: the first n new ones too; a list of
             steps: 0 is the last prompt token, s the s-th new one. A token that is run again is patched again.
    copies:  of each row, as many as generate makes: max(num_beams, num_return_sequences); default 1.

    Returns a mapping of input_ids [R, T], attention_mask [R, T], past_key_values (T - 1 tokens of R * copies rows; none
    where nothing can be shared, with the pixels instead), for one `model.hf.generate(**start, ...)`. Forwards that are
    given this cache, or a copy.deepcopy of it, are patched, in any thread; all others are not. The model is as it was
    once the caches are gone: `del start`, and what generate returned if that holds one.

    Raises as `engine.patch`, before anything runs; UnsupportedModelError for encoders and models whose cache is not
    transformers' own; ValueError if generate comes with other than R * copies rows, goes on twice, or goes beyond the
    context.

    >>> start = engine.start(model, "Q: hot\\nA:", heads=masks, values=means)
    >>> model.hf.generate(**start, max_new_tokens=5, do_sample=True, top_p=0.9).shape[0] == len(masks)
    True
    """
    steps = read_steps(model, heads, values, mode, steering, patched)
    several, prompts = as_prefixes(model, prompt)
    if several:
        raise ValueError(f"expected one prompt, whose rows are handed over together, got a list of {len(prompts)}")
    n_rows, copies = steps.patch.n_rows, read_int(copies, "copies")
    if not model.generates:
        raise UnsupportedModelError(f"{model.name} is an encoder: it answers, but does not generate text")
    assert isinstance(model, HuggingFace)  # as all models are that generate
    if refused := why_not_handed(model):
        raise UnsupportedModelError(f"a prompt of {model.name} cannot be handed over: {refused}")
    if steps.at(0) is not None:
        patched_positions(steps.patch, prompts[0])
    (can,) = able(model, prompts)
    if can.batch and n_rows * copies > 1:
        raise UnsupportedModelError(f"several rows of {model.name} cannot be handed over together: {can.batch}")
    n_tokens, longest = len(prompts[0].tokens), min(can.longest, model.shape.max_tokens)
    if n_tokens > longest:
        raise UnsupportedModelError(f"a prompt of {n_tokens} tokens of {model.name} cannot be handed over: {can.longer}")
    whole = can.expanded or why_not_split(prompts[0].prompt, n_tokens - 1) or n_tokens == 1
    prefix = KeyValues() if whole else compute(prompts, [n_tokens - 1])[0].cache[: n_tokens - 1]
    given = hand_over(model, prompts[0].prompt, prefix, n_rows, copies)
    edit_forwards_with(given["past_key_values"], model, _Changes(model, steps, n_tokens, copies, longest))
    return Start(given, len(prefix))


class _Changes:
    """What forwards do to the tokens that they are given."""

    def __init__(self, model: Model, steps: Steps, n_prompt: int, copies: int, longest: int):
        self.model, self.steps, self.n_prompt, self.longest = model, steps, n_prompt, longest
        self.n_rows, self.copies = steps.patch.n_rows, copies
        self.patch: Patch = steps.patch.select([row for row in range(self.n_rows) for _ in range(copies)])
        self.at = lru_cache(4)(self._at)  # one token after the other: the same masks again

    def __call__(self, batch: int, first: int, n_tokens: int) -> tuple[Edit | None, Steer | None]:
        """Of tokens [first, first + n_tokens): patched by where they stand, so whatever was run or cut off before."""
        if batch != self.patch.n_rows:
            raise ValueError(
                f"generate came with {batch} rows, where {self.n_rows} were handed over with copies={self.copies}: "
                f"copies must be max(num_beams, num_return_sequences), here {batch / self.n_rows:g}"
            )
        if first + n_tokens >= self.longest:
            raise ValueError(
                f"prompt and answer exceed {self.longest} tokens of {self.model.name}, the longest that go on from a "
                "cache: ask for fewer new tokens"
            )
        step = first - self.n_prompt + 1
        tail = tuple(i for i in range(n_tokens) if self.steps.at(step + i) is not None)
        return self.at(tail, n_tokens) if tail else (None, None)

    def _at(self, tail: tuple[int, ...], n_tokens: int) -> tuple[Edit, Steer | None]:
        return make_edit(self.model, self.patch, tail, n_tokens), make_steer(self.patch, tail)
