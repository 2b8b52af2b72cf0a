"""Answers of a patched model: which of their tokens are patched is the caller's to say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from engine.answers.decoding import Answer, Growing, OnToken, Speaking, activations, beside, together
from engine.answers.sampling import read_config
from engine.answers.steps import Patched, Steps, read_steps
from engine.core.budget import Budget
from engine.core.checking import able
from engine.core.patches import Heads, Mode, One, Values
from engine.core.patching import decide, request
from engine.core.planning import MAX_TOKENS, Strategy
from engine.core.prefix import Prefix, Prompts, as_prefixes, compute, patched_positions, shareable, why_not_split
from models import Capabilities, Model, UnsupportedModelError
from models.reading import read_int, read_seed
from models.shapes import Integer

if TYPE_CHECKING:
    from transformers import GenerationConfig

NEW_TOKENS = 20


@torch.no_grad()
def generate(
    model: Model,
    prompt: Prompts,
    patches: One | Sequence[One] | None = None,
    *,
    heads: Heads = None,
    values: Values = None,
    mode: Mode = "replace",
    patched: Patched = "prompt",
    by_step: bool = False,
    max_new_tokens: Integer | None = None,
    stop: str | Sequence[str] | None = None,
    config: GenerationConfig | None = None,
    seed: Integer = 0,
    memory: Integer | None = None,
    on_token: OnToken | None = None,
    capture: bool = False,
    strategy: Strategy = "auto",
) -> Any:  # str, list[str] or list[list[str]]; captured: of `Answer`s
    """Answer with patches of the prompt, and of new tokens if asked for; the likeliest tokens, or drawn.

    patches, heads, values, mode, strategy: as for `engine.patch`; without any of them the model answers unpatched.
    patched:  which tokens are patched with what is at position -1. "prompt": the prompt's last only (default), so that
              the patch lives on in its keys and values; "all": every new token too (the reference code's way); n: the
              first n new ones too; a list of steps: 0 is the prompt's last token, s the s-th new one.
    by_step:  values differ by step: Float[steps, L, H, D] or Float[steps, R, L, H, D]; "all" is then all of those.
    max_new_tokens: default the config's, or 20; an answer ends earlier at an end-of-text token, or where one of `stop`
              appears (cut off).
    config:   a transformers `GenerationConfig`: do_sample, temperature, top_k, top_p, min_p, typical_p,
              repetition_penalty, no_repeat_ngram_size, suppress_tokens, eos_token_id, stop_strings, max_new_tokens.
              What it leaves unset is off. For more, transformers' own `generate` goes on from `engine.start`.
    seed:     of the draws of a config with do_sample. An answer does not depend on what is asked beside it.
    memory:   bytes that rows may take; default an eighth of what is free. More rows are answered in parts.
    on_token: called as on_token(prompt, row, text) with what is new of an answer, as it comes.
    capture:  return `engine.Answer` (text, tokens, z of every step) in place of text, for a forward more a row.

    Returns one string; a list of them for several prompts or several rows; [prompts][rows] for both. Prompts and rows
    are decoded together. Raises as `engine.patch`; ValueError if prompt and answer would exceed the model's context,
    for steps beyond the answer, for a config that asks for what rows cannot do, and where logits turn out to be NaN.

    Source: Multimodal Task Vectors (arXiv 2406.15334), section 3.3; its reference code patches "all".

    >>> engine.generate(model, "Q: hot\\nA:", heads=[(10, 3)], values=means, max_new_tokens=3)
    '...'
    """
    seed = read_seed(seed)
    choice = read_config(config, seed)
    n_new = config.max_new_tokens if max_new_tokens is None and config is not None else max_new_tokens
    n_new = NEW_TOKENS if n_new is None else read_int(n_new, "max_new_tokens")
    steps = read_steps(model, patches, heads, values, mode, patched, by_step, n_new)
    several, prompts = as_prefixes(model, prompt)
    stops = _read_stops(stop, config)
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token must be a function of a prompt's number, a row's and text, got {on_token!r}")
    budget = Budget(model, memory)
    if not model.generates:
        raise UnsupportedModelError(f"{model.name} is an encoder: it answers, but does not generate text")
    if model.tokenizer is None:
        raise ValueError(
            f"{model.name} was wrapped without a tokenizer: answers are text, which needs wrap(..., tokenizer=)"
        )
    longest = max(len(p.tokens) for p in prompts)
    if longest + n_new > model.shape.max_tokens:
        raise ValueError(
            f"a prompt of {longest} tokens and {n_new} new ones exceed the {model.shape.max_tokens} of {model.name}"
        )
    rows = steps.select([0]).patch
    asked = [request(p, rows, (*patched_positions(rows, p), len(p.tokens) - 1)) for p in prompts]
    for one in prompts:
        patched_positions(steps.patch, one)
    decide(model, prompts, asked, strategy)  # refuses what it must before anything runs
    found = able(model, prompts, strategy, sites=steps.patch.sites)
    ways = [_way(p, steps, can, n_new, strategy) for p, can in zip(prompts, found, strict=True)]
    how = Speaking(n_new, choice, stops, _ends(model, config, stops), on_token)
    answers = _answer(model, how, steps, prompts, ways, budget)
    z = capture and [
        [_captured(model, steps.select([row]), ready, one) for row, one in enumerate(rows)]
        for p, rows in zip(prompts, answers, strict=True)
        for ready in _ready(p, steps)
    ]
    said: list[list[Any]] = z or [[one.text() for one in rows] for rows in answers]
    if steps.n_rows > 1:
        return said if several else said[0]
    return [rows[0] for rows in said] if several else said[0][0]


def _answer(
    model: Model, how: Speaking, steps: Steps, prompts: Sequence[Prefix], ways: Sequence[Strategy], budget: Budget
) -> list[list[Growing]]:
    """All answers, [prompts][rows]: as many at once as the budget, and one forward, take."""
    n_rows = steps.n_rows
    answers = [[Growing(model, how, p, row, n_rows) for row in range(n_rows)] for p in range(len(prompts))]

    def run(which: Sequence[int], some: slice) -> None:
        rows, here = steps.select(range(n_rows)[some]), [answers[p][some] for p in which]
        if how.on_token is None:  # after memory ran out: from the beginning
            here = [[Growing(model, how, p, one.place[1], n_rows) for one in answers[p][some]] for p in which]
        if ways[which[0]] == "packed":
            together(model, how, rows, [prompts[p] for p in which], here)
        else:
            beside(model, how, rows, prompts[which[0]], here[0], ways[which[0]])
        for p, new in zip(which, here, strict=True):
            answers[p][some] = new

    for way, group in groupby(range(len(prompts)), key=ways.__getitem__):
        fit = budget.answers(how.max_new_tokens)
        for which in _few(prompts, list(group), n_rows, fit if way == "packed" and not steps.alone else n_rows):
            if way != "packed":
                fit = min(fit, MAX_TOKENS // (len(prompts[which[0]].tokens) + how.max_new_tokens))
            elif fit < n_rows:  # the parts share the prompt
                (at,) = which
                prompts = [*prompts[:at], *_ready(prompts[at], steps), *prompts[at + 1 :]]
            budget.passes(n_rows, lambda fit=fit: fit, lambda some, which=which: run(which, some))  # type: ignore[misc]
    return answers


def _ready(prompt: Prefix, steps: Steps) -> list[Prefix]:
    return compute([prompt], [shareable(prompt, steps.first(len(prompt.tokens)))])


def _few(prompts: Sequence[Prefix], which: list[int], n_rows: int, fit: int) -> Iterator[list[int]]:
    """Groups of prompts that one forward, and the budget of rows, can take; one at least."""
    group: list[int] = []
    size = 0
    for index in which:
        cost = len(prompts[index].tokens) + n_rows
        if group and (size + cost > MAX_TOKENS or (len(group) + 1) * n_rows > fit):
            yield group
            group, size = [], 0
        group.append(index)
        size += cost
    yield group


def _way(prompt: Prefix, steps: Steps, can: Capabilities, n_new: int, strategy: Strategy) -> Strategy:
    """How the answers to a prompt are decoded: rows go on by themselves, so even one token packs."""
    n_tokens, sites = len(prompt.tokens), steps.patch.sites
    if strategy != "auto":
        if longer := can.why_not(strategy, n_tokens + n_new, sites):
            raise UnsupportedModelError(f"strategy {strategy!r} is not exact here: {longer}")
        return strategy
    if can.shared(n_tokens + n_new) or why_not_split(prompt.prompt, steps.first(n_tokens)):
        return "batch" if not can.batch else "naive"
    return "expanded" if can.why_not("packed", sites=sites) else "packed"


def _captured(model: Model, steps: Steps, prompt: Prefix, answer: Growing) -> Answer:
    tokens = torch.tensor(answer.tokens, dtype=torch.long)
    return Answer(answer.text(), tokens, activations(model, steps, prompt, tokens))


def _read_stops(stop: str | Sequence[str] | None, config: Any) -> tuple[str, ...]:
    given = (
        [stop] if isinstance(stop, str) else [] if stop is None else list(stop) if isinstance(stop, Sequence) else [0]
    )
    more = getattr(config, "stop_strings", None) or []
    if (stop is not None and not given) or not all(isinstance(one, str) and one for one in given):
        raise ValueError(f"stop must be text that ends an answer, a list of such, or None, got {stop!r}")
    return (*given, *([more] if isinstance(more, str) else more))


def _ends(model: Model, config: Any, stops: Sequence[str]) -> frozenset[int]:
    """Tokens that end an answer: also stops that are special tokens, which its text does not show."""
    ends = getattr(config, "eos_token_id", None)
    ends = model.eos if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
    known = getattr(getattr(model, "tokenizer", None), "added_tokens_decoder", {})
    special = {token.content: at for at, token in known.items() if token.special}
    if odd := [stop for stop in stops if stop not in special and any(token in stop for token in special)]:
        raise ValueError(f"the text of an answer has no special tokens: give them alone as a stop, got {odd[0]!r}")
    return ends | {special[stop] for stop in stops if stop in special}
