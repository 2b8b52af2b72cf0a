"""Every method on the same questions: what it answers, how near it comes to few-shot prompts, what finding it costs.

    heads that carry values       MTV by two estimators, STV, VTV, random heads
    the stream after one layer    FV and a learned vector added to it, a linear function of it
    heads that are read           SAV, where a task has labels

Each takes the same training questions, chooses by the same validation questions, and is asked the same held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from engine.artifacts import TaskVector
from engine.core.activations import mean_activations
from engine.experiments import vectors
from engine.experiments.setting import Record, Setting, Way, rows_of
from engine.experiments.spending import Spent
from engine.methods import linear
from engine.methods.function_vectors import FunctionVector
from engine.methods.learned import LearnedVector
from engine.methods.linear import LinearVector
from engine.methods.sav import SparseAttentionVectors
from engine.methods.vtv import ITERATIONS

SAV_HEADS, SAV_EACH = 20, 20  # heads that vote, and examples of a class: arXiv 2412.00142


def methods(s: Setting) -> list[Record]:
    """Zero-shot, few-shot, MTV (both estimators), STV, VTV, FV, learned, linear, random heads, SAV.

    distance: mean total variation to what the model says after demonstrations; of what is patched only.
    search_tokens, search_seconds: all that was run to find a vector; prompt_tokens: of these, of the prompts that its
    means or states are taken from.
    """
    base, found = s.asked(0), partial(vectors.found, s)
    many = vectors.n_tokens(s, s.many_shot)
    few = vectors.n_tokens(s, vectors.one_shot(s)[:ITERATIONS])
    pairs = vectors.n_tokens(s, [*vectors.in_context(s), *vectors.searched(s)])
    carried = {
        "MTV": (found("mtv", TaskVector, lambda: vectors.task_vector(s)), many),
        "MTV, straight-through": (
            found("mtv-gates", TaskVector, lambda: vectors.task_vector(s, **vectors.STRAIGHT_THROUGH)),
            many,
        ),
        "STV": (found("stv", TaskVector, lambda: vectors.sensitive_vector(s)), pairs),
        "VTV": (found("vtv", TaskVector, lambda: vectors.visual_vector(s)), few),
    }
    added = {
        "FV": (found("fv", FunctionVector, lambda: _function_vector(s)), many),
        "learned": (found("learned", LearnedVector, lambda: vectors.learned_vector(s)), 0),
        "linear": (found("linear", LinearVector, lambda: vectors.linear_vector(s)), pairs),
    }
    ways = [Way(base), *(Way(f"{base} + {name}", v.mask, v.values) for name, (v, _) in carried.items())]
    chance = s.random_heads(carried["MTV"][0], f"{base} + random heads")
    zero_shot, *patched, by_chance = _asked(s, [*ways, *chance])
    records = [zero_shot, *s.ask(s.queries(s.options.shots), [Way(f"{s.asked(s.options.shots)} ICL")]), *patched]
    for name, (vector, _) in added.items():
        patch = vector.after(vector.metadata["layer"]) if name == "FV" else vector.patch
        records += _asked(s, [Way(f"{base} + {name}")], patch)
    for name, (vector, read) in (carried | added).items():
        spent = vector.metadata["spent"]
        record = next(record for record in records if record["way"] == f"{base} + {name}")
        record |= dict(search_tokens=spent["tokens"], prompt_tokens=read, search_seconds=spent["seconds"])
    return [*records, *_sav(s), by_chance]


def _function_vector(s: Setting) -> FunctionVector:
    return vectors.function_vector(s, mean_activations(s.model, s.many_shot, progress=s.progress))


def _asked(s: Setting, ways: Sequence[Way], patches: Any = None) -> list[Record]:
    """As `Setting.ask`, with the distance to few-shot prompts."""
    records, (heads, values) = s.ask(s.queries(0), ways, patches), rows_of(ways)
    given: dict[str, Any] = dict(patches=patches, heads=heads, values=values)
    apart = linear.distance(s.model, s.queries(0), s.queries(s.options.shots), **given).mean(dim=0).tolist()
    for record in records:
        record["distance"] = fmean(one for one, way in zip(apart, ways, strict=True) if way.name == record["way"])
    return records


def _sav(s: Setting) -> list[Record]:
    """Whether the class is right: of a label, which is the whole answer."""
    if not getattr(s.task, "labels", ()):
        return []
    drawn: dict[Any, list[Any]] = {}
    for example in s.task.queries(s.split.train, s.split.train, 0, s.seed):
        drawn.setdefault(example.answer, []).append(example)
    shown = [example for some in drawn.values() for example in some[:SAV_EACH]]
    if len(drawn) < 2:
        return []
    queries, total = s.queries(0), s.model.shape.n_layers * s.model.shape.n_heads
    classifier = SparseAttentionVectors(s.model, heads=min(SAV_HEADS, total))
    with Spent().of(s.model) as spent, torch.no_grad():
        classifier.fit([e.prompt for e in shown], [e.answer for e in shown])
    right = classifier.score([e.prompt for e in queries], [e.answer for e in queries])
    return [
        dict(
            way="SAV", accuracy=right, exact=right, within=right, tokens=vectors.n_tokens(s, queries) / len(queries),
            queries=len(queries), heads=len(classifier.heads_), search_tokens=spent.tokens, prompt_tokens=spent.tokens,
            search_seconds=spent.seconds,
        )
    ]  # fmt: skip
