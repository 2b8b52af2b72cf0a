"""First-token scores: the loss that heads are searched by, and the accuracy that is reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.intervention import Heads, Steering, Values, check_model
from engine.patching import patch
from engine.prefix import Prefix, as_prefix
from models import Model, Prompt, PromptLike
from models.reading import as_int, read_tensor, tokenise
from models.shapes import Bool, Float, Integer

AT_ONCE = 16  # prompts whose logits [prompts, rows, vocab] are held at once


class Example(NamedTuple):
    """A prompt and its answer: text as it follows the prompt (" cold", with its space), or the token id itself."""

    prompt: PromptLike
    answer: str | Integer


ExampleLike: TypeAlias = Example | tuple[PromptLike, str | Integer] | list[Any]  # a plain pair is as good


def as_example(given: Any) -> Example | None:
    """An `Example`, or a plain (prompt, answer) as one; None for anything else, two token ids among it."""
    if isinstance(given, Example):
        return given
    pair = isinstance(given, (tuple, list)) and len(given) == 2 and as_int(given[0]) is None
    return Example(*given) if pair and (isinstance(given[1], str) or as_int(given[1]) is not None) else None


def read_examples(examples: Sequence[ExampleLike], what: str = "examples") -> list[Example]:
    """Examples, or plain (prompt, answer) pairs as such. Raises ValueError for none, TypeError for anything else."""
    found = [as_example(one) for one in examples] if isinstance(examples, Sequence) else [None]
    if not found:
        raise ValueError(f"no {what} were given")
    if None in found:
        odd = examples[found.index(None)] if isinstance(examples, Sequence) else examples
        raise TypeError(f"{what} must be a list of Examples or (prompt, answer) pairs, got {odd!r:.80}")
    return found  # type: ignore[return-value]


def check_examples(model: Model, examples: Sequence[Example]) -> list[int]:
    """How many tokens each prompt has. Raises for prompts and answers that cannot be run, before any is."""
    for example in examples:
        first_token(model, example)
    return [len(as_prefix(model, example.prompt).tokens) for example in examples]


def first_token(model: Model, example: ExampleLike) -> int:
    """Id of the first token of the answer, as tokenised after the prompt.

    Raises ValueError for an empty answer, one outside the vocabulary, or text where there is no tokenizer.

    >>> model.tokenizer.decode([engine.tasks.first_token(model, Example("Q: hot\\nA:", " cold"))])
    ' cold'
    """
    check_model(model)
    prompt, answer = example
    if (token := as_int(answer)) is not None:
        if not 0 <= token < model.shape.vocab_size:
            raise ValueError(f"answer token {token} lies outside the vocabulary of {model.shape.vocab_size}")
        return token
    text = prompt.text if isinstance(prompt, Prompt) else prompt
    if not isinstance(answer, str) or not answer or not isinstance(text, str):
        raise ValueError(f"an answer must be text after a text prompt, or a token id, got {example!r}")
    if model.tokenizer is None:
        raise ValueError(f"{model.name} was wrapped without a tokenizer: give token ids, or wrap(..., tokenizer=)")
    before, after = tokenise(text, model.tokenizer), tokenise(text + answer, model.tokenizer)
    if after[: len(before)] != before or len(after) == len(before):  # prompt and answer merge into one token
        return tokenise(answer, model.tokenizer, add_special_tokens=False)[0]
    return after[len(before)]


@torch.no_grad()
def first_token_losses(
    model: Model,
    prompts: Sequence[PromptLike | Prefix],
    targets: Sequence[Integer] | Tensor | np.ndarray,
    *,
    heads: Heads,
    values: Values,
) -> Float[Tensor, "prompts rows"]:
    """Cross-entropy, in nats, of each target at the last token, for every row of heads; on the CPU, in float32.

    >>> engine.tasks.first_token_losses(model, ["Q: hot\\nA:"], [5], heads=[(10, 3)], values=means).shape
    torch.Size([1, 1])
    """
    ids = [first_token(model, Example([], token)) for token in read_tensor(targets, "targets")]
    if len(ids) != len(prompts):
        raise ValueError(f"targets must be a token for each of {len(prompts)} prompts, got {len(ids)}")
    losses = []
    for start in range(0, len(prompts), AT_ONCE):
        logits = patch(model, list(prompts[start : start + AT_ONCE]), heads=heads, values=values).float()
        target = torch.tensor(ids[start : start + AT_ONCE], device=logits.device)
        target = target[:, None].expand(logits.shape[:2])
        losses.append(cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape))
    return torch.cat(losses).cpu()


@torch.no_grad()
def first_token_hits(
    model: Model,
    examples: Sequence[ExampleLike],
    *,
    heads: Heads = None,
    values: Values = None,
    steering: Steering | None = None,
) -> Bool[Tensor, "examples rows"]:
    """Whether the likeliest next token is the first token of the answer, for every example and row of heads.

    >>> engine.tasks.first_token_hits(model, [Example("Q: hot\\nA: cold\\n\\nQ: big\\nA:", " small")]).tolist()
    [[True]]
    """
    examples = read_examples(examples)
    targets = [first_token(model, example) for example in examples]
    hits = []
    for start in range(0, len(examples), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        logits = patch(model, [e.prompt for e in examples[some]], heads=heads, values=values, steering=steering)
        target = torch.tensor(targets[some], device=logits.device)
        hits.append(logits.argmax(dim=-1) == target[:, None])
    return torch.cat(hits).cpu()
