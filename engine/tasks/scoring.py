"""Losses and hits of answers, whole or by their first token: what heads are searched by, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.core.patches import Heads, One, Values
from engine.core.patching import patch
from engine.core.prefix import Prefix, as_prefix
from engine.core.reading import check_model
from models import Model, Prompt, PromptLike, UnsupportedModelError
from models.reading import as_int, read_list, read_tensor, tokenise
from models.shapes import Bool, Float, Integer

AT_ONCE = 16  # prompts whose logits [prompts, rows, vocab] are held at once


# The sum over an answer's tokens of their log-probabilities; their mean; that of its first token.
Scored: TypeAlias = Literal["answer", "token_mean", "first_token"]
# Text as it follows the prompt (" cold", with its space), a token id, or several.
Answer: TypeAlias = "str | Integer | Sequence[Integer] | Tensor | np.ndarray"


class Example(NamedTuple):
    """A prompt and its answer: text as it follows the prompt (" cold", with its space), a token id, or a list of them.

    >>> Example("Q: hot\\nA:", " cold").answer
    ' cold'
    """

    prompt: PromptLike
    answer: Answer


ExampleLike: TypeAlias = Example | tuple[PromptLike, Answer] | list[Any]  # a plain pair is as good


def as_example(given: Any) -> Example | None:
    """An `Example`, or a plain (prompt, answer) as one; None for anything else, two token ids or prompts among it."""
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
    return [len(as_prefix(model, one.prompt).tokens) for one in examples if answer_tokens(model, one)]


def answer_tokens(model: Model, example: ExampleLike) -> list[int]:
    """The tokens of an answer: those that the text has more when it stands after its prompt.

    Where the two merge (the answer's beginning and the prompt's last token become one), the answer is split off as text
    and has the tokens that it has alone: the prompt is given with tokens of its own, and must stay as it is.

    Raises ValueError for an empty answer, one outside the vocabulary, or text where there is no tokenizer.

    >>> engine.tasks.answer_tokens(model, Example([5, 6], [7, 8]))
    [7, 8]
    """
    check_model(model)
    prompt, answer = example
    if not isinstance(answer, str):
        ids = [as_int(answer)] if as_int(answer) is not None else [as_int(one) for one in read_list(answer)]
        if not ids or None in ids:
            raise ValueError(f"an answer must be text after a text prompt, or token ids, got {example!r:.200}")
        if outside := [token for token in ids if not 0 <= token < model.shape.vocab_size]:  # type: ignore[operator]
            raise ValueError(f"answer token {outside[0]} lies outside the vocabulary of {model.shape.vocab_size}")
        return ids  # type: ignore[return-value]
    text = prompt.text if isinstance(prompt, Prompt) else prompt
    if not answer or not isinstance(text, str):
        raise ValueError(f"an answer must be text after a text prompt, or token ids, got {example!r:.200}")
    if model.tokenizer is None:
        raise ValueError(f"{model.name} was wrapped without a tokenizer: give token ids, or wrap(..., tokenizer=)")
    before, after = tokenise(text, model.tokenizer), tokenise(text + answer, model.tokenizer)
    if after[: len(before)] != before or len(after) == len(before):
        return tokenise(answer, model.tokenizer, add_special_tokens=False)
    return after[len(before) :]


def first_token(model: Model, example: ExampleLike) -> int:
    """Id of the first token of the answer, as tokenised after the prompt. Raises as `answer_tokens`.

    >>> model.tokenizer.decode([engine.tasks.first_token(model, Example("Q: hot\\nA:", " cold"))])
    ' cold'
    """
    return answer_tokens(model, example)[0]


def scored_tokens(model: Model, example: ExampleLike, scored: str) -> list[int]:
    """The tokens of an answer that count."""
    tokens = answer_tokens(model, example)
    return tokens[:1] if scored == "first_token" else tokens


def with_answer(model: Model, prompt: PromptLike | Prefix, answer: Sequence[int]) -> Prefix:
    """The prompt and the answer's tokens but the last, its logits read where each token of the answer is foretold.

    Positions count in the whole: the prompt's last token is `-places`.

    Raises ValueError if that is more than the model's context, or the model does not go on from prompts.
    """
    prefix = as_prefix(model, prompt)
    if len(answer) == 1:
        return prefix
    if not model.generates:
        raise UnsupportedModelError(f"{model.name} is an encoder: its answers have one token, got {len(answer)}")
    n_tokens = len(prefix.tokens) + len(answer) - 1
    if n_tokens > model.shape.max_tokens:
        raise ValueError(
            f"prompt and answer have {n_tokens} tokens, {model.name} takes at most {model.shape.max_tokens}"
        )
    more = torch.tensor(answer[:-1], device=prefix.tokens.device)
    return replace(prefix, prompt=model.then(prefix.prompt, more), places=len(answer))


def cross_entropies(
    logits: Float[Tensor, "prompts rows *places vocab"], answers: Sequence[Sequence[int]], mean: bool = False
) -> Float[Tensor, "prompts rows"]:
    """Of answers of one length, in nats: summed over their tokens, or their mean; in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(*logits.shape[:2], len(answers[0]), -1)
    target = torch.tensor(answers, device=logits.device)[:, None].expand(logits.shape[:3])
    each = cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
    return each.mean(dim=-1) if mean else each.sum(dim=-1)


def losses_under(
    model: Model,
    prompts: Sequence[PromptLike | Prefix],
    answers: Sequence[Sequence[int]],
    patched: Callable[[int], Mapping[str, Any]],
    mean: bool = False,
) -> Float[Tensor, "prompts rows"]:
    """Cross-entropy, in nats, of each answer's tokens for every row of a patch: summed over them, or their mean.

    patched: what `engine.patch` is given, by the number of the answer's tokens: a prompt's last one is minus that.

    Differentiable in the values of patches. The answer's tokens ride along: still one pass.
    """
    if len(answers) != len(prompts):
        raise ValueError(f"targets must be an answer for each of {len(prompts)} prompts, got {len(answers)}")
    losses: list[Tensor] = [torch.empty(0)] * len(prompts)
    # Those of one length share a forward.
    order = sorted(range(len(prompts)), key=lambda n: len(answers[n]))
    for places, alike in groupby(order, key=lambda n: len(answers[n])):
        which = list(alike)
        for some in (which[start : start + AT_ONCE] for start in range(0, len(which), AT_ONCE)):
            grown = [with_answer(model, prompts[n], answers[n]) for n in some]
            logits = patch(model, grown, **patched(places))
            for n, loss in zip(some, cross_entropies(logits, [answers[n] for n in some], mean), strict=True):
                losses[n] = loss
    return torch.stack(losses)


@torch.no_grad()
def answer_losses(
    model: Model,
    prompts: Sequence[PromptLike | Prefix],
    answers: Sequence[Sequence[int]],
    *,
    heads: Heads,
    values: Values,
    mean: bool = False,
) -> Float[Tensor, "prompts rows"]:
    """Cross-entropy, in nats, of each answer's tokens for every row of heads, patched at the prompt's last token.

    Summed over the tokens, or their mean; on the CPU.

    >>> engine.tasks.answer_losses(model, ["Q: hot\\nA:"], [[5, 6]], heads=[(10, 3)], values=means).shape
    torch.Size([1, 1])
    """
    given = dict(heads=heads, values=values)
    return losses_under(model, prompts, answers, lambda places: given | {"positions": -places}, mean).cpu()


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
    ids = [answer_tokens(model, Example([], token)) for token in read_tensor(targets, "targets")]
    return answer_losses(model, prompts, ids, heads=heads, values=values)


@torch.no_grad()
def first_token_hits(
    model: Model,
    examples: Sequence[ExampleLike],
    patches: One | Sequence[One] | None = None,
    *,
    heads: Heads = None,
    values: Values = None,
) -> Bool[Tensor, "examples rows"]:
    """Whether the likeliest next token is the first token of the answer, for every example and row.

    Raises ValueError for logits that are NaN; else as `engine.patch`.

    >>> engine.tasks.first_token_hits(model, [Example("Q: hot\\nA: cold\\n\\nQ: big\\nA:", " small")]).tolist()
    [[True]]
    """
    examples = read_examples(examples)
    targets = [first_token(model, example) for example in examples]
    hits = []
    for start in range(0, len(examples), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        logits = patch(model, [e.prompt for e in examples[some]], patches, heads=heads, values=values)
        if logits.isnan().any():  # of which an argmax makes a token all the same
            broken = (start + logits.isnan().flatten(1).any(dim=1).nonzero().flatten()).tolist()
            raise ValueError(f"the logits of examples {broken} are NaN: no token is the likeliest")
        target = torch.tensor(targets[some], device=logits.device)
        hits.append(logits.argmax(dim=-1) == target[:, None])
    return torch.cat(hits).cpu()
