"""What a way to patch must offer to be measured: up to four verbs, each as its users would write it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.limits import Sizes
from models import Model
from models.shapes import Bool, Float, Int

BATCH = 32  # rows, or prompts, that the batched ways put in one forward

# What `prefill` returns and `patch` takes: the ids, or whatever the provider keeps of them.
Prompt: TypeAlias = Any


class Cannot(Exception):  # noqa: N818  (not an error: the provider is left out of the case)
    """The provider does not do this; the message says why."""


class Provider:
    """A way to patch. Verbs that are not overridden cannot be done.

    hf:      the transformers model, a Llama; a library that changes modules takes a `twin`.
    model:   the same, wrapped by this project.
    counted: W_O of every block: tokens that go through them are counted by hooks, and averaged over the blocks.
    library: that must be installed; empty if none.
    """

    name = ""
    library = ""
    all_logits = True  # of every token, not of the last only
    eager = False  # attention scores are written out

    def __init__(self, hf: Any, model: Model):
        self.hf = hf
        self.model = model
        self.counted: list[nn.Module] = [layer.self_attn.o_proj for layer in hf.model.layers]

    def prefill(self, ids: Int[Tensor, " tokens"]) -> Prompt:
        """All but the last token, if it can be kept; else the ids, which `patch` then computes again for every row."""
        return ids

    def patch(
        self, prompt: Prompt, heads: Bool[Tensor, "rows layers heads"], values: Float[Tensor, "layers heads head_dim"]
    ) -> Float[Tensor, "rows vocab"]:
        """Logits of the last token, whose masked heads output `values`."""
        raise Cannot("it does not patch")

    def losses(self, prompt: Prompt, heads: Tensor, values: Tensor, target: int) -> Float[Tensor, " rows"]:
        """Cross-entropy of the target, on the CPU, in float32."""
        logits = self.patch(prompt, heads, values).float()
        return cross_entropy(logits, torch.full((len(heads),), target, device=logits.device), reduction="none").cpu()

    def means(self, prompts: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "layers heads head_dim"]:
        """Mean over prompts of z at the last token."""
        raise Cannot("it collects no activations")

    def generate(
        self, ids: Int[Tensor, " tokens"], heads: Tensor, values: Tensor, new_tokens: int
    ) -> Int[Tensor, "rows new_tokens"]:
        """Greedy answers, the last prompt token and every new token patched."""
        raise Cannot("it does not generate")

    def at_once(self, case: str, rows: int) -> int:
        """Rows in one forward. 1: a loop, of which only a few rows are run a round."""
        return 1

    def tokens(self, rows: int, tokens: int) -> int:
        """About how many one call computes: only to see beforehand what would take too long."""
        return rows * tokens

    def planned(self, rows: int) -> int | None:
        """Tokens that one call computes, where hooks cannot count them; None: count."""
        return None

    def bytes_needed(self, sizes: Sizes, rows: int, tokens: int) -> int:
        """About the peak of a forward of that many rows: only to see beforehand what would not fit."""
        held = self.tokens(rows, tokens)
        numbers = held * (4 * sizes.mlp_width + (sizes.vocab_size if self.all_logits else 0)) + rows * sizes.vocab_size
        scores = 3 * rows * sizes.heads * tokens**2 if self.eager else 0
        return sizes.itemsize * (numbers + scores)


def twin(hf: Any) -> Any:
    """Modules of its own around the same weights: a library that rewires modules leaves the others' alone."""
    return deepcopy(hf, {id(weight): weight for weight in hf.parameters()})


def mean_of(zs: list[Tensor]) -> Float[Tensor, "layers heads head_dim"]:
    """Of z [layers, heads, head_dim] of each prompt."""
    return torch.stack(zs).double().mean(dim=0).float()
