"""What finding a vector costs: tokens that pass a model's embedding, and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from models import Model
from models.calls import Passing


class Spent:
    """Tokens that a model runs, and those whose passes are gone through backwards; seconds.

    counting: while it is False, no token is counted.
    """

    def __init__(self) -> None:
        self.forward, self.backward, self.seconds, self.counting = 0, 0, 0.0, True

    @property
    def tokens(self) -> int:
        return self.forward + self.backward

    @contextmanager
    def of(self, model: Model) -> Iterator[Spent]:
        """Within: what this model runs is counted."""

        def count(_: Any, args: tuple[Tensor, ...]) -> None:
            if self.counting:
                self.forward += args[0].numel()
                self.backward += args[0].numel() * torch.is_grad_enabled()

        embeddings = model.hf.get_input_embeddings()  # type: ignore[attr-defined]
        handle, started = embeddings.register_forward_pre_hook(Passing(count)), time.perf_counter()
        try:
            yield self
        finally:
            handle.remove()
            self.seconds += time.perf_counter() - started
