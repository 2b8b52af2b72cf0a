"""What is measured: a cell of the grid, the model it is of, and the rows of it that are run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import models
from bench.cases import Question
from bench.providers.provider import twin
from bench.shapes import Numbers
from models import Model
from models.opening import Backend


@dataclass(frozen=True)
class Cell:
    """One question: of which model, of how many tokens and rows."""

    case: str
    shape: str
    tokens: int
    rows: int
    dtype: str
    device: str
    backend: str = "huggingface"

    @property
    def model(self) -> tuple[str, str, str, str]:
        return self.shape, self.dtype, self.device, self.backend


def wrap(hf: Any, backend: Backend | str) -> Model:
    """The model that the oracle and this engine run, by one of the backends."""
    if backend == "huggingface":
        return models.wrap(hf, Numbers())
    own = twin(hf)
    if backend == "nnsight":
        import nnsight

        return models.wrap(nnsight.NNsight(own), Numbers())
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return models.wrap(
        build_bridge_from_module(own, type(own).__name__, hf_config=own.config, tokenizer=None), Numbers()
    )


def some_rows(question: Question, count: int) -> Question:
    """Of all rows, `count` of them spread from the first to the last."""
    last = len(question.heads) - 1
    return replace(question, run=torch.linspace(0, last, min(count, last + 1)).round().long())
