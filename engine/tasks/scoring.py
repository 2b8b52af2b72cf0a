"""First-token scores: the loss that heads are searched by, and the accuracy that is reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.intervention import Heads, Steering
from engine.patching import patch
from engine.prefix import Prefix
from models import Model, Prompt, PromptLike
from models.shapes import Bool, Float

AT_ONCE = 16  # prompts whose logits [prompts, rows, vocab] are held at once


class Example(NamedTuple):
    """A prompt and its answer: text as it follows the prompt (" cold", with its space), or the token id itself."""

    prompt: PromptLike
    answer: str | int


def first_token(model: Model, example: Example) -> int:
    """Id of the first token of the answer, as tokenised after the prompt.

    Raises ValueError for an empty answer, one outside the vocabulary, or text where there is no tokenizer.

    >>> model.tokenizer.decode([engine.tasks.first_token(model, Example("Q: hot\\nA:", " cold"))])
    ' cold'
    """
    prompt, answer = example
    if isinstance(answer, int):
        if not 0 <= answer < model.shape.vocab_size:
            raise ValueError(f"answer token {answer} lies outside the vocabulary of {model.shape.vocab_size}")
        return answer
    text = prompt.text if isinstance(prompt, Prompt) else prompt
    if not answer or not isinstance(text, str):
        raise ValueError(f"an answer must be text after a text prompt, or a token id, got {example!r}")
    if model.tokenizer is None:
        raise ValueError(f"{model.name} was wrapped without a tokenizer: give token ids, or wrap(..., tokenizer=)")
    before = model.tokenizer(text)["input_ids"]
    after = model.tokenizer(text + answer)["input_ids"]
    if after[: len(before)] != before or len(after) == len(before):  # prompt and answer merge into one token
        return model.tokenizer(answer, add_special_tokens=False)["input_ids"][0]
    return after[len(before)]


@torch.no_grad()
def first_token_losses(
    model: Model,
    prompts: Sequence[PromptLike | Prefix],
    targets: Sequence[int],
    *,
    heads: Heads,
    values: Tensor | None,
) -> Float[Tensor, "prompts rows"]:
    """Cross-entropy, in nats, of each target at the last token, for every row of heads; on the CPU, in float32.

    >>> engine.tasks.first_token_losses(model, ["Q: hot\\nA:"], [5], heads=[(10, 3)], values=means).shape
    torch.Size([1, 1])
    """
    losses = []
    for start in range(0, len(prompts), AT_ONCE):
        logits = patch(model, list(prompts[start : start + AT_ONCE]), heads=heads, values=values).float()
        target = torch.tensor(targets[start : start + AT_ONCE], device=logits.device)
        target = target[:, None].expand(logits.shape[:2])
        losses.append(cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape))
    return torch.cat(losses).cpu()


@torch.no_grad()
def first_token_hits(
    model: Model,
    examples: Sequence[Example],
    *,
    heads: Heads = None,
    values: Tensor | None = None,
    steering: Steering | None = None,
) -> Bool[Tensor, "examples rows"]:
    """Whether the likeliest next token is the first token of the answer, for every example and row of heads.

    >>> engine.tasks.first_token_hits(model, [Example("Q: hot\\nA: cold\\n\\nQ: big\\nA:", " small")]).tolist()
    [[True]]
    """
    hits = []
    for start in range(0, len(examples), AT_ONCE):
        some = examples[start : start + AT_ONCE]
        logits = patch(model, [e.prompt for e in some], heads=heads, values=values, steering=steering)
        target = torch.tensor([first_token(model, e) for e in some], device=logits.device)
        hits.append(logits.argmax(dim=-1) == target[:, None])
    return torch.cat(hits).cpu()
