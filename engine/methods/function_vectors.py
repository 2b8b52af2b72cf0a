"""Function vectors: one vector, added to the residual stream, that stands for a task (Todd et al., arXiv 2310.15213).

    mu[l, h]  = mean z[l, h] at the last token of clean ten-shot prompts
    CIE[l, h] = P(y | shuffled prompt, z[l, h] := mu[l, h]) - P(y | shuffled prompt)
    AIE       = mean of CIE over shuffled prompts
    v         = sum over the k heads of the highest AIE of  W_O[l, h] mu[l, h]
    h_l      += v at the last prompt token, and at every generated one

W_O's bias is not counted, neither once nor once a head. The shuffled prompts' demonstrations have permuted answers, so
that their format is known, and the task is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.artifacts import can_begin, load_tensors, save_tensors
from engine.core.activations import mean_activations
from engine.core.patches import Patch, Values
from engine.core.reading import check_model, read_heads, read_means
from engine.questions.effects import Effects
from engine.questions.sweeping import sweep
from engine.tasks.scoring import (
    Example,
    ExampleLike,
    Scored,
    answer_tokens,
    as_example,
    check_examples,
    first_token_hits,
    read_examples,
)
from models import Model, Prompt, PromptLike
from models.reading import read_int
from models.shapes import Bool, Float, Integer


@dataclass(frozen=True)
class FunctionVector:
    """A vector to be added to the residual stream, and the heads that it was made of.

    >>> vector = engine.fv.FunctionVector(torch.zeros(model.shape.d_model), [(2, 1)])
    >>> answer = engine.generate(model, "Q: hot\\nA:", vector.after(layer=1), max_new_tokens=2)
    """

    vector: Float[Tensor, " d_model"]
    heads: list[tuple[int, int]]
    metadata: dict[str, Any] = field(default_factory=dict)

    def after(self, layer: Integer) -> Patch:
        """The patch that adds it to the residual stream after this layer."""
        return Patch("resid_post", [layer], self.vector, mode="add")

    def save(self, path: str | Path) -> None:
        """Write vector, heads and metadata to one file."""
        save_tensors(path, {"vector": self.vector}, {**self.metadata, "heads": self.heads})

    @classmethod
    def load(cls, path: str | Path) -> FunctionVector:
        """Raises FileNotFoundError, or ValueError for a file that is something else."""
        tensors, metadata = load_tensors(path, ("vector",))
        return cls(tensors["vector"], [(layer, head) for layer, head in metadata.pop("heads")], metadata)


def extract(
    model: Model,
    clean: Sequence[PromptLike | ExampleLike],
    shuffled: Sequence[ExampleLike],
    *,
    k: Integer = 10,
    means: Values = None,
    scored: Scored = "answer",
    bos: bool = False,
    correct_only: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[FunctionVector, Effects]:
    """The function vector of a task, and the causal effect of every head on the shuffled prompts (CIE; its mean: AIE).

    clean:    few-shot prompts (or examples) that the means are taken from; the paper: 100 ten-shot prompts.
    shuffled: few-shot examples whose demonstrations' answers are permuted; the paper: 25.
    k:        heads summed; the paper: 10 for GPT-J, more for larger models. means: in place of those of `clean`.
    scored:   the probability is of the whole answer (default), or of its first token, as in the paper's code.
    bos:      put a beginning-of-text token before prompts where the tokenizer adds none, as the paper's code does;
              default not. Such vectors belong to such prompts: `engine.fv.begun` makes them.
    correct_only: as the paper's code, take means and effects from what the model answers right (first token). `clean`
              are then examples, shuffled[i] is clean[i] with permuted answers (`few_shot` of one seed). Default not.

    Raises ValueError for more heads than there are, or none; for a tokenizer without a beginning of text; where nothing
    is answered right, or clean and shuffled do not go together; else as `engine.sweep`.

    Source: Function Vectors (arXiv 2310.15213), section 2.

    >>> vector, effects = engine.fv.extract(model, ["Q: hot\\nA:"], [Example("Q: hot\\nA:", " c")], k=2, progress=False)
    >>> vector.vector.shape == (model.shape.d_model,), len(vector.heads)
    (True, 2)
    """
    check_model(model)
    k, ranked = read_int(k, "k", None), read_examples(shuffled, "shuffled examples")
    n_heads = model.shape.n_layers * model.shape.n_heads
    if not 1 <= k <= n_heads:
        raise ValueError(f"k must lie between 1 and the {n_heads} heads of {model.name}, got {k}")
    check_examples(model, ranked)  # before the means
    if checkpoint is not None:
        can_begin(checkpoint)
    if bos:
        clean, ranked = begun(model, clean), begun(model, ranked)
    if correct_only:
        clean, ranked = _answered(model, clean, ranked)
    if means is None:
        given = (example.prompt if (example := as_example(one)) else one for one in clean)
        means = mean_activations(model, given, progress=progress)  # type: ignore[arg-type]
    options: dict[str, Any] = dict(metric="probability", scored=scored, checkpoint=checkpoint, progress=progress)
    effects = sweep(model, ranked, means, **options)
    heads: list[tuple[int, int]] = effects.top(k, by="positive")
    metadata = dict(method="fv", model=model.name, shape=model.shape.as_dict(), k=k, prompts=len(ranked), bos=bos)
    return FunctionVector(compose(model, means, heads), heads, metadata), effects


def begun(model: Model, prompts: Sequence[Any]) -> list[Any]:
    """Prompts, or examples, with a beginning-of-text token before them where the tokenizer adds none; as token ids.

    >>> engine.fv.begun(model, ["Q: hot\\nA:"])[0][0] == model.tokenizer.bos_token_id
    True
    """
    token = getattr(model.tokenizer, "bos_token_id", None)
    if token is None:
        raise ValueError(f"{model.name} has no beginning-of-text token: its tokenizer names none")
    found: list[Any] = []
    for one in prompts:
        example = as_example(one)
        if isinstance(prompt := example.prompt if example else one, Prompt) and prompt.images:
            raise ValueError("a beginning-of-text token is put before text, got a prompt with images")
        ids = model.encode(prompt).tolist()
        ids = ids if ids[0] == token else [token, *ids]
        found.append(Example(ids, answer_tokens(model, example)) if example else ids)
    return found


def _answered(model: Model, clean: Sequence[Any], shuffled: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What the model answers right, and of the shuffled ones those of the same queries."""
    examples = read_examples(clean, "clean examples")
    ids, others = ([answer_tokens(model, one) for one in some] for some in (examples, shuffled))
    if len(others) > len(ids) or ids[: len(others)] != others:
        raise ValueError(
            f"correct_only needs shuffled[i] to be clean[i] with permuted answers: got {len(others)} shuffled ones, "
            f"whose answers are not those of the first of {len(ids)} clean ones"
        )
    right = first_token_hits(model, examples)[:, 0].tolist()
    kept = [[one for one, hit in zip(some, right, strict=False) if hit] for some in (examples, shuffled)]
    if not all(kept):
        raise ValueError(f"{model.name} answers {sum(right)} of {len(right)} clean prompts right: none can be taken")
    return kept[0], kept[1]


def compose(model: Model, means: Values, heads: Sequence[tuple[Integer, Integer]]) -> Float[Tensor, " d_model"]:
    """Sum over heads of W_O[l, h] mu[l, h], in float32.

    >>> engine.fv.compose(model, means, [(1, 0), (2, 3)]).shape == (model.shape.d_model,)
    True
    """
    check_model(model)
    means = read_means(model, means)
    total = torch.zeros(model.shape.d_model)
    read_heads(model.shape, heads)
    for layer, head in ((int(layer), int(head)) for layer, head in heads):
        total += model.project(layer, means[layer])[head].detach().float().cpu()
    return total


def hits_by_layer(
    model: Model, examples: Sequence[ExampleLike], vector: Float[Tensor, " d_model"] | np.ndarray
) -> Bool[Tensor, "examples layers_and_none"]:
    """Whether the first token is right with the vector added after each layer, and, last, without it: one row each.

    >>> engine.fv.hits_by_layer(model, [Example("Q: hot\\nA:", " c")], torch.zeros(model.shape.d_model)).shape[1]
    31
    """
    check_model(model)
    n_layers = model.shape.n_layers
    each = torch.eye(n_layers + 1, n_layers, dtype=torch.bool)
    return first_token_hits(model, examples, Patch("resid_post", each, vector, mode="add"))
