"""Edge attribution of a whole model: what it costs, and how well it ranks edges that are run one by one."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

import engine
from bench.memory import peak
from models import Model

Pair: TypeAlias = tuple[str, str, str, str]  # prompt, source, and the answers to either
SHARES = (0.002, 0.01, 0.05, 0.2)  # of all edges
NAMES = ("Mary", "John", "Tom", "Anna", "James", "Sarah", "Peter", "Alice", "Mark", "Kate", "Paul", "Lisa", "Mary")
PLACES = ("store", "park", "school", "office", "station")
THINGS = ("drink", "book", "ring", "letter")
TEMPLATES = (
    "When {} and {} went to the {} in the morning, {} gave a {} to",
    "Then, {} and {} were working at the {}. {} decided to give a {} to",
)


def pairs(count: int) -> list[Pair]:
    """Prompt, source, and the answers to either: who is given something is the other of two names.

    Source: indirect object identification, Interpretability in the Wild (arXiv 2211.00593), section 2.
    """
    found = []
    for n in range(count):
        two = list(pairwise(NAMES))[n % (len(NAMES) - 1)]
        place, thing = PLACES[n % len(PLACES)], THINGS[n % len(THINGS)]
        giver, given = (two[0], two[1]) if n % 3 else (two[1], two[0])
        text = TEMPLATES[n % 2]
        prompt, source = (text.format(*two, place, who, thing) for who in (giver, given))
        found.append((prompt, source, f" {given}", f" {giver}"))
    return found


def measure(model: Model, count: int = 20, steps: int = 5, exact: int = 500, compared: int = 3) -> dict[str, Any]:
    """Seconds and peak of all pairs. Over the first of them, of one step and of several: Spearman's correlation of mean
    effects with edges that are run, and how much of the metric circuits of the strongest edges keep.
    """
    every = pairs(count)
    lengths = [len(model.encode(prompt)) for prompt, *_ in every]
    _attributed(model, every[:1], steps)  # sites are looked for
    started = time.perf_counter()
    effects = _attributed(model, every, steps)
    seconds = time.perf_counter() - started
    graph = engine.Graph.of(model)
    result: dict[str, Any] = {
        "pairs": f"{count} of {min(lengths)} to {max(lengths)} tokens, {torch.get_num_threads()} threads",
        "senders x receivers": f"{len(graph.senders)} x {len(graph.receivers)}, {len(graph.edges)} edges",
        "metric, clean and source": f"{effects.clean.mean():.2f} and {effects.reference.mean():.2f}",  # type: ignore[union-attr]
        f"{steps} steps, seconds": seconds,
        f"{steps} steps, peak beyond weights, MiB": peak(partial(_attributed, model, every, steps)),
    }
    some = every[:compared]
    chosen = sorted(random.Random(0).sample(range(len(graph.edges)), exact))
    started = time.perf_counter()
    found = engine.exact_edges(model, edges=[graph.edges[i] for i in chosen], **_given(some))
    result[f"{exact} edges of {compared} prompts run, seconds"] = time.perf_counter() - started
    for k in dict.fromkeys((1, steps)):
        estimated = _attributed(model, some, k).mean
        result[f"{k} steps, Spearman"] = found.rank_correlation(estimated[chosen])
        for share in SHARES:
            result[f"{k} steps, metric kept by {share:.1%} of edges"] = _kept(model, graph, some, estimated, share)
    return result


def _given(some: Sequence[Pair]) -> dict[str, Any]:
    prompts, source, targets, others = (list(each) for each in zip(*some, strict=True))
    return dict(
        prompts=prompts, source=source, targets=targets, others=others, metric="logit_difference", progress=False
    )


def _attributed(model: Model, some: Sequence[Pair], steps: int) -> engine.Effects:
    return engine.attribute_edges(model, steps=steps, **_given(some))


def _kept(model: Model, graph: engine.Graph, some: Sequence[Pair], effects: Tensor, share: float) -> float:
    """Faithfulness of edges of large effects: with these alone the metric is the prompt's (1) or the source's (0)."""
    strongest = torch.zeros(len(effects), dtype=torch.bool)
    strongest[effects.abs().topk(round(share * len(effects))).indices] = True
    keep = torch.zeros(3, *graph.exists.shape, dtype=torch.bool)
    keep[0], keep[2, graph.exists] = True, strongest
    kept = []
    for prompt, source, *answers in some:
        target, other = (engine.tasks.first_token(model, (prompt, answer)) for answer in answers)
        logits = engine.edge_runs(model, prompt, source, keep)
        clean, reference, circuit = (logits[:, target] - logits[:, other]).tolist()
        kept.append((circuit - reference) / (clean - reference))
    return sum(kept) / len(kept)
