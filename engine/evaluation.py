"""How good a task vector is, on words it has not seen, and what a query costs beside few-shot prompting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.intervention import Heads
from engine.progress import track
from engine.tasks.scoring import Example, first_token_hits
from models import Model


@dataclass(frozen=True)
class Score:
    """First-token accuracy over held-out queries, asked one at a time.

    low, high: 95% Wilson interval of the accuracy.
    tokens:    prompt tokens a query, mean. seconds: a query, median.
    """

    name: str
    hits: int
    queries: int
    low: float
    high: float
    tokens: float
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.hits / self.queries


def evaluate(
    model: Model,
    name: str,
    examples: Sequence[Example],
    *,
    heads: Heads = None,
    values: Tensor | None = None,
    progress: bool = False,
) -> Score:
    """Ask every example by itself, patched if heads are given, and time it.

    Raises ValueError for no examples; as `engine.patch` for the rest.

    >>> score = engine.evaluate(model, "zero-shot", [Example("Q: hot\\nA:", " cold")])
    >>> score.queries
    1
    """
    from scipy.stats import binomtest

    if not examples:
        raise ValueError("no examples were given")
    hits, seconds = [], []
    for example in track(examples, name, progress):
        started = time.perf_counter()
        hits.append(bool(first_token_hits(model, [example], heads=heads, values=values)[0, 0]))
        seconds.append(time.perf_counter() - started)
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    tokens = statistics.fmean(len(model.encode(example.prompt)) for example in examples)
    return Score(name, sum(hits), len(hits), interval.low, interval.high, tokens, statistics.median(seconds))
