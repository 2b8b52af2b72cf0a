"""How good a task vector is, on words it has not seen, and what a query costs beside few-shot prompting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.distributed import ALONE, World, digest, identity
from engine.intervention import Heads, Values, read_patch
from engine.progress import track
from engine.tasks.scoring import ExampleLike, check_examples, first_token_hits, read_examples
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
    examples: Sequence[ExampleLike],
    *,
    heads: Heads = None,
    values: Values = None,
    progress: bool = False,
    world: World = ALONE,
) -> Score:
    """Ask every example by itself, patched if heads are given, and time it.

    world: the ranks (`engine.distributed.joined`) that share out the examples; default this process alone.

    Raises ValueError for no examples; as `engine.patch` for the rest; LostRankError if a rank is lost.

    >>> score = engine.evaluate(model, "zero-shot", [Example("Q: hot\\nA:", " cold")])
    >>> score.queries
    1
    """
    patch = read_patch(model, heads, values)
    examples = read_examples(examples)
    lengths = check_examples(model, examples)
    if world.size > 1:
        world.same(identity(model) | {"name": name, "lengths": lengths, "patch": digest(patch.heads, patch.values)})
    measured: list[tuple[bool, float]] = []
    for example in track(examples[world.share(len(examples))], name, progress and world.rank == 0):
        started = time.perf_counter()
        hit = bool(first_token_hits(model, [example], heads=heads, values=values)[0, 0])
        measured.append((hit, time.perf_counter() - started))
    mine = torch.tensor(measured, dtype=torch.float64).reshape(-1, 2)
    hits, seconds = world.gather(mine, len(examples)).T.tolist()
    n_hits = int(sum(hits))
    low, high = wilson(n_hits, len(hits))
    return Score(name, n_hits, len(hits), low, high, statistics.fmean(lengths), statistics.median(seconds))


def wilson(hits: int, queries: int) -> tuple[float, float]:
    """95% interval of an accuracy."""
    from scipy.stats import binomtest

    interval = binomtest(hits, queries).proportion_ci(method="wilson")
    return interval.low, interval.high
