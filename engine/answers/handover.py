"""A patched prompt handed over to transformers' own `generate`: sampling, beams, streaming, constraints are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from engine.answers.steps import Patched, Steps, read_steps
from engine.core.capabilities import known
from engine.core.checking import able
from engine.core.edits import make_edits
from engine.core.patches import Heads, Mode, One, Values
from engine.core.prefix import Prefix, as_prefixes, patched_positions, why_not_split
from models import Capabilities, Edits, Model, PromptLike, UnsupportedModelError
from models.handing import Changes, change_forwards, hand_over, why_not_handed
from models.huggingface import HuggingFace
from models.reading import read_int
from models.shapes import Integer


@dataclass(frozen=True)
class Start(Mapping[str, Any]):
    """What transformers' `generate` is given, `generate(**start)`. It writes to the cache, so a start is good for one.

    given: by the names of `generate`. check: raises ValueError if that is not any more what was handed over.
    """

    given: Mapping[str, Any]
    check: Callable[[Any], None]

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def __len__(self) -> int:
        return len(self.given)

    def __iter__(self) -> Iterator[str]:
        self.check(self.given["past_key_values"])
        return iter(self.given)


@torch.no_grad()
def start(
    model: Model,
    prompt: PromptLike | Prefix,
    patches: One | Sequence[One] | None = None,
    *,
    heads: Heads = None,
    values: Values = None,
    mode: Mode = "replace",
    patched: Patched = "prompt",
    copies: Integer = 1,
) -> Start:
    """A patched prompt for transformers' own `generate`, which chooses every new token, by all that it can do.

    patches, heads, values, mode: as for `engine.patch`; R rows are a batch of R texts.
    patched: "prompt": the last prompt token; "all": every new token too; n: the first n new ones too; or a list of
             steps, 0 the last prompt token, s the s-th new one. A token that is run twice is patched twice.
    copies:  of each row, as many as generate makes: max(num_beams, num_return_sequences). Default 1.

    Returns a mapping: input_ids [R, T], attention_mask [R, T], past_key_values (T - 1 tokens of R * copies rows; none
    where nothing can be shared, but the pixels), for one `model.hf.generate(**start, ...)`; `copy.deepcopy(start)`,
    made before, is another. Forwards given that cache are patched, in any thread, no others; the model is as it was
    when it is gone: `del start`, and what generate returned if that holds it.

    Raises as `engine.patch`, before anything runs; UnsupportedModelError for encoders, compiled models, and those whose
    past is not in a cache of transformers'. ValueError, later, if generate has other than R * copies rows, unpacks a
    start twice, or exceeds the context.

    >>> start = engine.start(model, "Q: hot\\nA:", heads=masks, values=means)
    >>> len(model.hf.generate(**start, max_new_tokens=5, do_sample=True, top_p=0.9)) == len(masks)
    True
    """
    steps = read_steps(model, patches, heads, values, mode, patched)
    several, prompts = as_prefixes(model, prompt)
    if several:
        raise ValueError(f"expected one prompt, whose rows go on together, got a list of {len(prompts)}")
    copies, encoded, n_tokens = read_int(copies, "copies"), prompts[0].prompt, len(prompts[0].tokens)
    if not model.generates:
        raise UnsupportedModelError(f"{model.name} is an encoder: it answers, but does not generate text")
    assert isinstance(model, HuggingFace)  # as all are that generate
    if not steps.patch.sites.isdisjoint(("k", "v")):
        raise UnsupportedModelError(
            "keys and values of transformers' cache stay unpatched: engine.generate patches k and v"
        )
    if refused := why_not_handed(model):
        raise UnsupportedModelError(f"prompts of {model.name} cannot be handed over: {refused}")
    patched_positions(steps.patch, prompts[0])
    first = steps.first(n_tokens)
    rows = [row for row in range(steps.patch.n_rows) for _ in range(copies)]
    _refuse(model, known(model, bool(encoded.inputs)).can, n_tokens, len(rows))
    (can,) = able(model, prompts)
    longest = _refuse(model, can, n_tokens, len(rows))
    unshared = can.expanded or why_not_split(encoded, first)
    given = hand_over(model, encoded, 0 if unshared else first, steps.patch.n_rows, copies)
    cache = given["past_key_values"]
    n_cached, state = cache.get_seq_length(), model.state()
    change_forwards(cache, model, encoded.ids, _changes(model, steps, rows, n_tokens, longest))

    def check(cache: Any) -> None:
        if (found := cache.get_seq_length()) != n_cached:
            raise ValueError(
                f"this start was gone on from: its cache has {found} tokens, and had {n_cached}; make another, "
                "or copy.deepcopy(start) before the first generate"
            )
        if model.state() != state:
            raise ValueError(
                f"{model.name} has changed since this start was made (modules, weights, hooks): make another"
            )

    return Start(given, check)


def _refuse(model: Model, can: Capabilities, n_tokens: int, n_rows: int) -> int:
    """The most tokens of prompt and answer. Raises UnsupportedModelError for more of them, or of rows, than can be."""
    longest = min(can.longest, model.shape.max_tokens)
    if n_tokens >= longest:
        why = can.longer if longest == can.longest else "that is its context"
        raise UnsupportedModelError(f"{n_tokens} tokens of {model.name} leave no room for an answer: {why}")
    if can.batch and n_rows > 1:
        raise UnsupportedModelError(f"{n_rows} rows of {model.name} cannot go on together: {can.batch}")
    return longest


def _changes(model: Model, steps: Steps, rows: list[int], n_prompt: int, longest: int) -> Changes:
    """Of a forward: tokens are patched by where they stand, whatever was run, chosen or cut off before."""
    n_rows, each = steps.n_rows, steps.select(rows)

    def changes(batch: int, first: int, n_tokens: int) -> Edits:
        if batch != len(rows):
            raise ValueError(
                f"generate has {batch} rows, and {n_rows} * {len(rows) // n_rows} copies were handed over: "
                f"engine.start(..., copies={batch / n_rows:g}), that is max(num_beams, num_return_sequences)"
            )
        if first + n_tokens >= longest:
            raise ValueError(f"prompt and answer exceed the {longest} tokens that {model.name} can go on to")
        return at(tuple(tuple(tokens) for _, tokens in each.placed(n_prompt, first, n_tokens)))

    @lru_cache(4)  # one token after the other: the same masks and values again
    def at(tokens: tuple[tuple[tuple[int, int], ...], ...]) -> Edits:
        return make_edits(model, list(zip(each.patch.each, tokens, strict=True)), 1, n_prompt)

    return changes
