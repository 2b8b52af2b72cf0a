"""Vectors of a setting by other methods than MTV: each drawn from the same questions, found once and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.artifacts import TaskVector
from engine.core.activations import mean_activations
from engine.core.prefix import as_prefix
from engine.experiments.setting import VALIDATION, Setting
from engine.experiments.spending import Spent
from engine.methods import function_vectors, learned, linear, mtv, stv, vtv
from engine.methods.function_vectors import FunctionVector
from engine.tasks import Example

SHUFFLED, FV_HEADS = 25, 10  # prompts and heads of a function vector, arXiv 2310.15213
STRAIGHT_THROUGH = dict(estimator="straight_through", prompts_per_step=4, candidates="thresholds", lr=0.2)


def searched(s: Setting) -> list[Example]:
    """The questions that vectors are searched on."""
    return s.task.queries(s.split.train[: s.options.examples], s.split.train, 0, s.seed)


def in_context(s: Setting) -> list[Example]:
    """The same, each after demonstrations."""
    return s.task.queries(s.split.train[: s.options.examples], s.split.train, s.options.shots, s.seed)


def validation(s: Setting) -> list[Example]:
    return s.task.queries(s.split.validation[:VALIDATION] or s.split.train[:VALIDATION], s.split.train, 0)


def one_shot(s: Setting) -> list[Example]:
    """The same after one demonstration."""
    return s.task.queries(s.split.train[: s.options.examples], s.split.train, s.one, s.seed)


def visual_vector(s: Setting) -> TaskVector:
    """VTV: means and heads from one-shot prompts, ten iterations each."""
    shown = one_shot(s)
    iterations = min(vtv.ITERATIONS, len(shown))
    return vtv.extract(s.model, shown, iterations=iterations, seed=s.seed, progress=s.progress)


def function_vector(s: Setting, means: Any) -> FunctionVector:
    """FV: means of the many-shot prompts, heads ranked on prompts whose demonstrations' answers are permuted.

    metadata: "layer" is the one that is best on validation questions, where the paper takes layer 20.
    """
    shuffled = s.task.few_shot(s.split.train, max(1, s.options.shots), SHUFFLED, s.seed + 1, shuffled=True)
    k = min(FV_HEADS, s.model.shape.n_layers * s.model.shape.n_heads)
    function, _ = function_vectors.extract(s.model, s.many_shot, shuffled, k=k, means=means, progress=s.progress)
    hits = function_vectors.hits_by_layer(s.model, validation(s), function.vector)[:, :-1]
    function.metadata["layer"] = int(hits.float().mean(dim=0).argmax())
    return function


def task_vector(s: Setting, **options: Any) -> TaskVector:
    """MTV, its means included."""
    means = mean_activations(s.model, s.many_shot, progress=s.progress)
    return mtv.extract(
        s.model, searched(s), means, steps=s.options.steps, seed=s.seed, validation=validation(s), progress=s.progress,
        **options,
    )  # fmt: skip


def sensitive_vector(s: Setting) -> TaskVector:
    """STV, of fewer centroids where there are few prompts."""
    asked, shown = searched(s), in_context(s)
    return stv.extract(
        s.model, asked, shown, centroids=min(stv.CENTROIDS, len(shown)), steps=s.options.steps, seed=s.seed,
        validation=validation(s), progress=s.progress,
    )  # fmt: skip


def learned_vector(s: Setting) -> learned.LearnedVector:
    """Added after a third of the layers."""
    return learned.extract(
        s.model, searched(s), [s.model.shape.n_layers // 3], steps=2 * s.options.steps, seed=s.seed,
        validation=validation(s), progress=s.progress,
    )  # fmt: skip


def linear_vector(s: Setting) -> linear.LinearVector:
    return linear.extract(s.model, in_context(s), searched(s), progress=s.progress)


def found(s: Setting, name: str, kind: Any, make: Callable[[], Any]) -> Any:
    """A vector, kept by its name with what it cost; found again by a run that goes on.

    kind: its class, which saves and loads. metadata: "spent" has the tokens, forward and backward, and the seconds of
    all that was run to find it. A search that is killed begins anew, so that this is all.
    """
    path = s.path(name)
    if path.is_file():
        kept = kind.load(path)
        if kept.metadata.get("setting") == s.identity and "spent" in kept.metadata:
            return kept
    with Spent().of(s.model) as spent:
        vector = make()
    vector.metadata.update(
        task=s.task.name, seed=s.seed, setting=s.identity, spent=dict(tokens=spent.tokens, seconds=spent.seconds)
    )
    vector.save(path)
    return vector


def n_tokens(s: Setting, prompts: Any) -> int:
    """Of all of them together."""
    return sum(len(as_prefix(s.model, one.prompt if isinstance(one, Example) else one).tokens) for one in prompts)
