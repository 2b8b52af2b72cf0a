"""Edge attribution of a whole model: what it costs, and how well it ranks edges that are run one by one."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch

import engine
from bench.memory import peak
from bench.questions import Pairs
from models import Model


def measure(model: Model, count: int = 20, steps: int = 5, exact: int = 500, compared: int = 3) -> dict[str, Any]:
    """Seconds and peak of all pairs. Over the first of them, of one step and of several: Spearman's correlation of mean
    effects with edges that are run.
    """
    pairs = Pairs(model, count)
    attribute = partial(engine.attribute_edges, model, steps=steps)
    attribute(**pairs.asked([0]))  # sites are looked for
    started = time.perf_counter()
    effects = attribute(**pairs.asked(range(count)))
    seconds = time.perf_counter() - started
    graph, some = engine.Graph.of(model), pairs.asked(range(compared))
    result: dict[str, Any] = {
        "pairs": f"{pairs}, {torch.get_num_threads()} threads",
        "senders x receivers": f"{len(graph.senders)} x {len(graph.receivers)}, {len(graph.edges)} edges",
        "metric, clean and source": f"{effects.clean.mean():.2f} and {effects.reference.mean():.2f}",  # type: ignore[union-attr]
        f"{steps} steps, seconds": seconds,
        f"{steps} steps, peak beyond weights, MiB": peak(partial(attribute, **pairs.asked(range(count)))),
    }
    chosen = sorted(random.Random(0).sample(range(len(graph.edges)), exact))
    started = time.perf_counter()
    found = engine.exact_edges(model, edges=[graph.edges[i] for i in chosen], **some)
    result[f"{exact} edges of {compared} pairs run, seconds"] = time.perf_counter() - started
    for k in dict.fromkeys((1, steps)):
        estimated = engine.attribute_edges(model, steps=k, **some).mean
        result[f"{k} steps, Spearman"] = found.rank_correlation(estimated[chosen])
    return result
