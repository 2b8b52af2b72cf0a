"""Greedy answers of a patched model: the last prompt token and every new token are patched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch

from engine.checking import able
from engine.intervention import Heads, Mode, Patch, Steering, Values, read_patch
from engine.patching import decide, request
from engine.planning import MAX_TOKENS, Request, Strategy, make_plan
from engine.prefix import Prefix, Prompts, as_prefixes, compute, why_not_split
from engine.runner import make_edit, make_steer, run, segments
from models import Capabilities, Model, Segment, UnsupportedModelError
from models.reading import read_int
from models.shapes import Integer


@torch.no_grad()
def generate(
    model: Model,
    prompt: Prompts,
    *,
    heads: Heads = None,
    values: Values = None,
    mode: Mode = "replace",
    steering: Steering | None = None,
    max_new_tokens: Integer = 20,
    stop: str | None = None,
    strategy: Strategy = "auto",
) -> str | list[str] | list[list[str]]:
    """Answer greedily with heads patched at the last prompt token and at every generated token.

    heads, values, mode, steering, strategy: as for `engine.patch`; without any of them the model answers unpatched.
    max_new_tokens: default 20; an answer ends earlier at an end-of-text token, or where `stop` appears (cut off).

    Returns one string; a list of them for several prompts or several rows; [prompts][rows] for both. Prompts and rows
    are decoded together. Raises as `engine.patch`; ValueError if prompt and answer would exceed the model's context.

    Source: Multimodal Task Vectors (arXiv 2406.15334), section 3.3, and its reference code.

    >>> engine.generate(model, "Q: hot\\nA:", heads=[(10, 3)], values=means, max_new_tokens=3)
    '...'
    """
    patch = read_patch(model, heads, values, -1, mode, steering)
    several, prompts = as_prefixes(model, prompt)
    max_new_tokens = read_int(max_new_tokens, "max_new_tokens")
    if stop is not None and (not isinstance(stop, str) or not stop):
        raise ValueError(f"stop must be text that ends an answer, or None, got {stop!r}")
    if not model.generates:
        raise UnsupportedModelError(f"{model.name} is an encoder: it answers, but does not generate text")
    if model.tokenizer is None:
        raise ValueError(
            f"{model.name} was wrapped without a tokenizer: answers are text, which needs wrap(..., tokenizer=)"
        )
    longest = max(len(p.tokens) for p in prompts)
    if longest + max_new_tokens > model.shape.max_tokens:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed "
            f"the {model.shape.max_tokens} of {model.name}"
        )
    asked = [request(p, 1, (len(p.tokens) - 1,)) for p in prompts]
    decide(model, prompts, asked, strategy)  # refuses what it must before anything runs
    found = able(model, prompts, strategy)
    can = {id(p): one for p, one in zip(prompts, found, strict=True)}
    ways = {id(p): _way(p, can[id(p)], max_new_tokens, strategy) for p in prompts}
    answers: list[list[str]] = []
    for way, group in groupby(prompts, key=lambda prompt: ways[id(prompt)]):
        if way == "packed":
            for some in _few(list(group), patch.n_rows):
                answers += _decode_together(model, patch, some, max_new_tokens, stop)
        else:
            answers += [_decode_one_by_one(model, patch, p, max_new_tokens, stop, way, can[id(p)]) for p in group]
    if patch.n_rows > 1:
        return answers if several else answers[0]
    return [rows[0] for rows in answers] if several else answers[0][0]


def _way(prompt: Prefix, can: Capabilities, max_new_tokens: int, strategy: Strategy) -> Strategy:
    """How the answers to a prompt are decoded: rows go on by themselves, so even one token packs."""
    n_tokens = len(prompt.tokens)
    if strategy != "auto":
        if longer := can.why_not(strategy, n_tokens + max_new_tokens):
            raise UnsupportedModelError(f"strategy {strategy!r} is not exact here: {longer}")
        return strategy
    if can.shared(n_tokens + max_new_tokens) or why_not_split(prompt.prompt, n_tokens - 1):
        return "batch" if not can.batch else "naive"
    return "expanded" if can.packed else "packed"


def _few(prompts: list[Prefix], n_rows: int) -> Iterator[list[Prefix]]:
    """Groups of prompts that one forward can take."""
    group: list[Prefix] = []
    size = 0
    for prompt in prompts:
        cost = len(prompt.tokens) + n_rows
        if group and size + cost > MAX_TOKENS:
            yield group
            group, size = [], 0
        group.append(prompt)
        size += cost
    yield group


def _decode_together(
    model: Model, patch: Patch, prompts: list[Prefix], max_new_tokens: int, stop: str | None
) -> list[list[str]]:
    """Rows of all prompts in one packed forward a token. A row's own tokens are patched, so their keys and values are
    its own; the prompt's are shared.
    """
    answers = [[_Answer(model, stop) for _ in range(patch.n_rows)] for _ in prompts]
    packed = segments(prompts, [len(prompt.tokens) - 1 for prompt in prompts], patch.n_rows)
    live = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        edit, steer = make_edit(model, patch, [0], 1, len(packed)), make_steer(patch, [0], len(packed))
        out = model.pack(packed, edit, keep=True, steer=steer)
        tokens = out.logits.argmax(dim=-1)  # [prompts, rows]
        going = []
        for index, (prompt_index, row) in enumerate(zip(live, tokens.tolist(), strict=True)):
            unfinished = [answer.take(token) for answer, token in zip(answers[prompt_index], row, strict=True)]
            if any(unfinished):
                going.append(index)
        packed = [Segment(out.contexts[i], tokens[i][:, None], out.rows[i]) for i in going]
        live = [live[i] for i in going]
        if not live:
            break
    return [[answer.text() for answer in row] for row in answers]


def _decode_one_by_one(
    model: Model,
    patch: Patch,
    prompt: Prefix,
    max_new_tokens: int,
    stop: str | None,
    strategy: Strategy,
    can: Capabilities,
) -> list[str]:
    """Each row by itself, from patched forwards over the growing prompt."""
    n_prompt = len(prompt.tokens)
    if strategy == "expanded":
        prompt = compute([prompt], [n_prompt - 1])[0]
    answers = []
    for row in range(patch.n_rows):
        answer, grown = _Answer(model, stop), prompt
        for _ in range(max_new_tokens):
            n_tokens = len(grown.tokens)
            positions = tuple(range(n_prompt - 1, n_tokens))
            plan = make_plan(model.shape, can, Request(n_tokens, 1, positions), strategy)
            token = run(model, replace(patch.rows(row, row + 1), positions=positions), [grown], [plan])[0, 0].argmax()
            grown = replace(grown, prompt=grown.prompt.then(token[None]))
            if not answer.take(int(token)):
                break
        answers.append(answer.text())
    return answers


class _Answer:
    """The tokens of one answer, until it ends."""

    def __init__(self, model: Model, stop: str | None):
        self.model = model
        self.stop = stop
        self.tokens: list[int] = []
        self.ended = False

    def take(self, token: int) -> bool:
        """Append a token unless the answer has ended; whether it goes on."""
        if not self.ended:
            self.ended = token in self.model.eos
            if not self.ended:
                self.tokens.append(token)
                self.ended = self.stop is not None and self.stop in self._decoded()
        return not self.ended

    def text(self) -> str:
        return self._decoded().split(self.stop)[0] if self.stop else self._decoded()

    def _decoded(self) -> str:
        return self.model.decode(torch.tensor(self.tokens, dtype=torch.long))
