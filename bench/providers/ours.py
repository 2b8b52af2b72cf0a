"""The engine of this project, by each of its strategies."""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor

import engine
import models
from bench.limits import Sizes
from bench.providers import naive
from bench.providers.provider import BATCH, Cannot, Prompt, Provider
from engine import tasks
from models import Model
from models.linear import PACKS, packs_of


class Ours(Provider):
    """One strategy, named and not chosen: `auto` would take the first that is exact."""

    all_logits = False
    strategy: Any = ""

    def __init__(self, hf: Any, model: Model):
        super().__init__(hf, model)
        self.counted = model.projections  # type: ignore[attr-defined]  # of the backend that is measured
        # Met for the first time, a model is checked against naive: here, so that no call is timed with it.
        ids = torch.arange(8, device=model.device)
        engine.patch(model, ids, heads=None, values=None, strategy=self.strategy)

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        return engine.patch(self.model, prompt, heads=heads, values=values, strategy=self.strategy)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        return naive.generate(self.model, ids, heads, values, new_tokens, self.strategy)


class Sharing(Ours):
    """A prefix computed once, and rows of one token."""

    def prefill(self, ids: Tensor) -> Prompt:
        return engine.prefill(self.model, ids)

    def means(self, prompts: Tensor) -> Tensor:
        raise Cannot("mean activations have no strategy: see packed")

    def at_once(self, case: str, rows: int) -> int:
        return rows

    def tokens(self, rows: int, tokens: int) -> int:
        return rows + tokens - 1


class Packed(Sharing):
    """The verbs that have no strategy are measured here."""

    name = strategy = "packed"

    def losses(self, prompt: Prompt, heads: Tensor, values: Tensor, target: int) -> Tensor:
        return tasks.first_token_losses(self.model, [prompt], [target], heads=heads, values=values)[0]

    def means(self, prompts: Tensor) -> Tensor:
        return engine.mean_activations(self.model, list(prompts), progress=False)


class Reordered(Sharing):
    """Packed rows as within `models.reordered`, in a context of its own, which lasts as long as this does."""

    name, strategy = "reordered", "packed"

    def __init__(self, hf: Any, model: Model):
        super().__init__(hf, model)
        self._context = copy_context()
        try:
            self._context.run(PACKS.set, packs_of(model))
        except models.UnsupportedModelError as error:
            raise Cannot(str(error)) from error

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        return self._context.run(super().patch, prompt, heads, values)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        raise Cannot("see packed")


class Layered(Sharing):
    name = strategy = "layered"

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        raise Cannot("answers are generated packed: see there")


class Expanded(Sharing):
    name = strategy = "expanded"

    def at_once(self, case: str, rows: int) -> int:
        return 1 if case == "generate" else rows

    def bytes_needed(self, sizes: Sizes, rows: int, tokens: int) -> int:
        copies = 2 * rows * tokens * sizes.layers * sizes.kv_width
        return super().bytes_needed(sizes, rows, tokens) + sizes.itemsize * copies


class RowStep(Sharing):
    """`engine.RowStep`: packed rows of one size over a prefix that stays in its buffers; on CUDA a recorded graph."""

    name = "rowstep"

    def __init__(self, hf: Any, model: Model):
        Provider.__init__(self, hf, model)
        self.counted = []
        self._step: engine.RowStep | None = None
        self._size = (0, 0)

    def patch(self, prompt: Prompt, heads: Tensor, values: Tensor) -> Tensor:
        if isinstance(prompt, Tensor):
            raise Cannot("it is made for prefixes that are kept: see reused")
        size = (len(heads), len(prompt.cache))
        if self._step is None or size != self._size:
            self._step, self._size = engine.RowStep(self.model, *size), size
        return self._step(prompt, heads=heads, values=values)

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        raise Cannot("it does not generate")

    def planned(self, rows: int) -> int:
        return rows


class Batch(Ours):
    name = strategy = "batch"

    def means(self, prompts: Tensor) -> Tensor:
        raise Cannot("mean activations have no strategy: see packed")

    def generate(self, ids: Tensor, heads: Tensor, values: Tensor, new_tokens: int) -> Tensor:
        raise Cannot("answers are generated row by row, as by naive")

    def at_once(self, case: str, rows: int) -> int:
        return min(rows, BATCH)
