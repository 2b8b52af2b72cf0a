"""Answers that grow token by token: rows of many prompts together, or rows of one prompt beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.answers.sampling import Choice
from engine.answers.steps import Steps
from engine.core import naive
from engine.core.prefix import Prefix, compute, shareable
from engine.core.runner import make_edit, make_steer, segments
from models import Edit, Model, Segment, Steer
from models.shapes import Float, Int

# on_token(prompt, row, text): what a row of a prompt says next.
OnToken: TypeAlias = Callable[[int, int, str], Any]
_Make: TypeAlias = Callable[[Any, Sequence[int], int], tuple[Edit | None, Steer | None]]


@dataclass(frozen=True)
class Answer:
    """What a row said.

    text:   up to the first stop.
    tokens: all that were generated, less the end-of-text token.
    z:      what every head output, as patched, at step 0, the prompt's last token, and at each token of the answer.

    >>> engine.generate(model, "Q: hot\\nA:", max_new_tokens=2, capture=True).z.shape[0]
    3
    """

    text: str
    tokens: Int[Tensor, " tokens"]
    z: Float[Tensor, "steps layers heads head_dim"]


@dataclass(frozen=True)
class Speaking:
    """How answers are made: how tokens are chosen, and where an answer ends."""

    max_new_tokens: int
    choice: Choice = field(default_factory=Choice)
    stops: tuple[str, ...] = ()
    eos: frozenset[int] = frozenset()
    on_token: OnToken | None = None


class Growing:
    """The tokens of one answer, until it ends."""

    def __init__(self, model: Model, how: Speaking, prompt: int, row: int, n_rows: int):
        self.model, self.how = model, how
        self.place = (prompt, row)
        self.tokens: list[int] = []
        self.ended = False
        self.random = how.choice.generator(prompt * n_rows + row)
        self._said = 0

    def take(self, token: int) -> bool:
        """Append a token unless the answer has ended; whether it goes on."""
        if self.ended:
            return False
        self.ended = token in self.how.eos
        if not self.ended:
            self.tokens.append(token)
            decoded = self._decoded() if self.how.stops or self.how.on_token else ""
            self.ended = any(stop in decoded for stop in self.how.stops) or len(self.tokens) == self.how.max_new_tokens
        if self.how.on_token:
            self._say(self.how.on_token)
        return not self.ended

    def _say(self, on_token: OnToken) -> None:
        """What is new of the text, but for half a character, or what may be the beginning of a stop."""
        text = self.text()
        end = len(text)
        if not self.ended:
            end -= len(text) - len(text.rstrip("\ufffd"))
            begun = [n for stop in self.how.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            end = min(end, len(text) - max(begun, default=0))
        if end > self._said:
            on_token(*self.place, text[self._said : end])
            self._said = end

    def text(self) -> str:
        text = self._decoded()
        return text[: min((text.find(stop) for stop in self.how.stops if stop in text), default=len(text))]

    def _decoded(self) -> str:
        return self.model.decode(torch.tensor(self.tokens, dtype=torch.long))


def together(
    model: Model, how: Speaking, steps: Steps, prompts: Sequence[Prefix], answers: Sequence[Sequence[Growing]]
) -> None:
    """Rows of all prompts in one packed forward a token. From the prompt's last token on, keys and values are a row's
    own; those before are shared. Prompts whose answers have ended drop out.
    """
    packed = segments(prompts, [len(prompt.tokens) - 1 for prompt in prompts], len(answers[0]))
    live = list(range(len(prompts)))
    for step in range(how.max_new_tokens):
        patch = steps.at(step)
        edit = None if patch is None else make_edit(model, patch, [0], 1, len(packed))
        steer = None if patch is None else make_steer(patch, [0], len(packed))
        out = model.pack(packed, edit, keep=step + 1 < how.max_new_tokens, steer=steer)
        chosen = [
            _choose(how, prompts[at].tokens, answers[at], some) for at, some in zip(live, out.logits, strict=True)
        ]
        taken = [_take(answers[at], tokens) for at, tokens in zip(live, chosen, strict=True)]
        going = [i for i, goes_on in enumerate(taken) if goes_on]
        if not going:
            break
        packed = [Segment(out.contexts[i], chosen[i][:, None], out.rows[i]) for i in going]
        live = [live[i] for i in going]


def beside(
    model: Model, how: Speaking, steps: Steps, prompt: Prefix, answers: Sequence[Growing], strategy: str
) -> None:
    """Rows of one prompt, equally long: a plain forward a token over each whole answer, from the model's own cache of
    the prompt on (expanded), or over all of it (batch; naive, a row at a time).
    """
    if strategy == "naive" and len(answers) > 1:
        for row, answer in enumerate(answers):
            beside(model, how, steps.select([row]), prompt, [answer], strategy)
        return
    split = len(prompt.tokens) - 1 if strategy == "expanded" else 0
    prefix = compute([prompt], [split])[0].cache[:split] if split else None
    ids, first = prompt.tokens[split:].expand(len(answers), -1), len(prompt.tokens) - 1 - split
    make = partial(_naive if strategy == "naive" else _rows, model)
    for _ in range(how.max_new_tokens):
        edit, steer = over(steps, first, ids.shape[1], make)
        inputs = None if split else model.then(prompt.prompt, ids[0, first + 1 :]).inputs
        logits = model.forward(ids, edit, prefix, inputs, steer)
        tokens = _choose(how, prompt.tokens, answers, logits)
        if not _take(answers, tokens):
            break
        ids = torch.cat([ids, tokens[:, None]], dim=1)


def _choose(
    how: Speaking, prompt: Int[Tensor, " tokens"], answers: Sequence[Growing], logits: Float[Tensor, "rows vocab"]
) -> Int[Tensor, " rows"]:
    """The next token of every row of one prompt. A row that has ended says anything."""
    before = prompt.expand(len(answers), -1)
    if how.choice.processors:
        longest = max(len(answer.tokens) for answer in answers)
        said = [answer.tokens + answer.tokens[-1:] * (longest - len(answer.tokens)) for answer in answers]
        said = [one + [0] * (longest - len(one)) for one in said]
        before = torch.cat([before, torch.tensor(said, dtype=torch.long, device=before.device)], dim=1)
    return how.choice.choose(before, logits, [answer.random for answer in answers])


def _take(answers: Sequence[Growing], tokens: Int[Tensor, " rows"]) -> bool:
    """Whether any of the answers goes on."""
    return any([answer.take(token) for answer, token in zip(answers, tokens.tolist(), strict=True)])


def over(steps: Steps, first: int, n_tokens: int, make: _Make) -> tuple[Edit | None, Steer | None]:
    """All that is done to rows of `n_tokens`, of which token `first` is step 0."""
    at = [step for step in range(n_tokens - first) if step in steps.patched]
    if not at:
        return None, None
    edit, steer = make(steps.patch, [first + step for step in at], n_tokens)
    if steps.by_step is None:
        return edit, steer
    each: list[Any] = [make(steps.at(step), [first + step], n_tokens)[0] for step in at]

    def one_by_one(layer: int, z: Tensor) -> Tensor:
        for edit in each:
            z = edit(layer, z)
        return z

    return one_by_one, steer


def _rows(model: Model, patch: Any, positions: Sequence[int], n_tokens: int) -> tuple[Edit, Steer | None]:
    return make_edit(model, patch, positions, n_tokens), make_steer(patch, positions)


def _naive(model: Model, patch: Any, positions: Sequence[int], n_tokens: int) -> tuple[Edit, Steer | None]:
    return naive.row_edit(model, patch, 0, positions)


def activations(model: Model, steps: Steps, prompt: Prefix, tokens: Int[Tensor, " tokens"]) -> Tensor:
    """What heads output at every step of an answer, as patched: [1 + tokens, L, H, D]. One forward of a single row."""
    last = len(prompt.tokens) - 1
    split = shareable(prompt, last)
    prefix = compute([prompt], [split])[0].cache[:split] if split else None
    ids = torch.cat([prompt.tokens[split:], tokens.to(prompt.tokens)])
    edit, steer = over(steps, last - split, len(ids), partial(_rows, model))
    kept: list[Tensor] = []

    def keep(layer: int, z: Tensor) -> Tensor:
        z = z if edit is None else edit(layer, z)
        kept.append(pad(z[0, last - split :], (0, model.shape.head_dim - z.shape[-1])).to(model.device))
        return z

    inputs = None if split else model.then(prompt.prompt, tokens.to(prompt.tokens)).inputs
    model.forward(ids[None], keep, prefix, inputs, steer)
    return model.all_heads(torch.stack(kept, dim=1), -2)
