"""Answers that grow token by token: rows of many prompts together, or rows of one prompt beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.answers.sampling import Choice
from engine.answers.steps import Steps
from engine.core import naive
from engine.core.edits import keeping, make_edits
from engine.core.prefix import Prefix, compute, shareable
from engine.core.runner import segments
from models import Model, Segment
from models.shapes import Float, Int

# on_token(prompt, row, text): what a row of a prompt says next.
OnToken: TypeAlias = Callable[[int, int, str], Any]


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
    """Rows of all prompts in one packed forward a token. From the first patched token on, keys and values are a row's
    own; those before are shared. Prompts whose answers have ended drop out.
    """
    packed = segments(prompts, [steps.first(len(prompt.tokens)) for prompt in prompts], len(answers[0]))
    live, n_prompt = list(range(len(prompts))), len(prompts[0].tokens)  # of several prompts only the last token counts
    for step in range(how.max_new_tokens):
        n_tokens = packed[0].rows.shape[1]
        here = steps.placed(n_prompt, n_prompt + step - n_tokens, n_tokens)
        edits = make_edits(model, here, len(packed), n_prompt)
        out = model.pack(packed, edits, keep=step + 1 < how.max_new_tokens)
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
    n_prompt = len(prompt.tokens)
    split = steps.first(n_prompt) if strategy == "expanded" else 0
    prefix = compute([prompt], [split])[0].cache[:split] if split else None
    ids = prompt.tokens[split:].expand(len(answers), -1)
    for _ in range(how.max_new_tokens):
        changes = steps.placed(n_prompt, split, ids.shape[1])
        if strategy == "naive":
            edits = naive.row_edits(model, 0, changes, n_prompt)
        else:
            edits = make_edits(model, changes, 1, n_prompt)
        inputs = None if split else model.then(prompt.prompt, ids[0, n_prompt:]).inputs
        logits = model.forward(ids, edits, prefix, inputs)
        tokens = _choose(how, prompt.tokens, answers, logits)
        if not _take(answers, tokens):
            break
        ids = torch.cat([ids, tokens[:, None]], dim=1)


def _choose(
    how: Speaking, prompt: Int[Tensor, " tokens"], answers: Sequence[Growing], logits: Float[Tensor, "rows vocab"]
) -> Int[Tensor, " rows"]:
    """The next token of every row of one prompt. A row that has ended says anything. Raises ValueError for NaN."""
    broken = logits.isnan().any(dim=-1).tolist()  # of which an argmax makes a token all the same
    if places := [one.place for one, nan in zip(answers, broken, strict=True) if nan and not one.ended]:
        raise ValueError(f"the logits of (prompt, row) {places} are NaN: no token is the likeliest")
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


def activations(model: Model, steps: Steps, prompt: Prefix, tokens: Int[Tensor, " tokens"]) -> Tensor:
    """What heads output at every step of an answer, as patched: [1 + tokens, L, H, D]. One forward of a single row."""
    n_prompt = len(prompt.tokens)
    split = shareable(prompt, steps.first(n_prompt))
    prefix = compute([prompt], [split])[0].cache[:split] if split else None
    ids = torch.cat([prompt.tokens[split:], tokens.to(prompt.tokens)])
    kept: list[Tensor] = []

    def keep(_: str, __: int, z: Tensor) -> None:
        here = z[0, n_prompt - 1 - split :].clone()
        kept.append(pad(here, (0, model.shape.head_dim - z.shape[-1])).to(model.device))

    edits = make_edits(model, steps.placed(n_prompt, split, len(ids)), 1, n_prompt)
    inputs = None if split else model.then(prompt.prompt, tokens.to(prompt.tokens)).inputs
    model.forward(ids[None], keeping(edits, ["z"], model.shape.n_layers, keep), prefix, inputs)
    return model.all_heads(torch.stack(kept, dim=1), -2)
