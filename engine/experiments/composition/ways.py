"""Ways to compose the same task vectors, each chosen on samples that are not reported: addition, and negation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from engine import weights
from engine.experiments.composition.sets import Labelled
from engine.experiments.composition.stages import Heads, features_of, joined, regression
from engine.methods import vtvc
from engine.methods.posterior import Kind, Posterior
from engine.weights.vectors import TaskVectors
from models.shapes import Float

LEARNED: dict[str, Kind] = {
    "learned by block (aTLAS)": "shared",
    "deterministic": "deterministic",
    "Gaussian": "gaussian",
    "spike and slab": "spike_and_slab",
    "gated (VTVC)": "gated",
}
WAYS = ("zero-shot", "task arithmetic", *LEARNED, "router", "individual")
SCALES = [round(0.05 * i, 2) for i in range(21)]
# Of these the select part chooses; LOG.md has what was tried: 1e-2 and 3e-3, for the shared 1e-2 and its authors' 1e-3.
RATES: Mapping[str, tuple[float, ...]] = {"shared": (1e-2,)}
AMORTISED = (3e-3,)

Coefficients: TypeAlias = Float[Tensor, "*batch vectors blocks"]


@dataclass(frozen=True)
class Part:
    """Samples of all sets: inputs, the set and the label of each, the frozen base's features."""

    inputs: dict[str, Tensor]
    sets: Tensor
    labels: Tensor
    features: Float[Tensor, "samples width"]

    @classmethod
    def of(cls, base: nn.Module, parts: list[Labelled]) -> Part:
        inputs, sets, labels = joined(parts)
        return cls(inputs, sets, labels, features_of(base, inputs))


@dataclass(frozen=True)
class Setting:
    """One seed: base, heads, vectors (one a set, in their order), and parts by what they are for."""

    base: nn.Module
    heads: Heads
    vectors: TaskVectors
    parts: Mapping[str, Part]
    names: tuple[str, ...]
    epochs: int
    forget_epochs: int
    seed: int
    folder: Path
    progress: bool


@dataclass(frozen=True)
class Found:
    """What a way came to.

    right:  accuracy of each set on the test part. zeros: share of coefficients that are exactly 0.
    chosen: on the select part. validation: mean accuracy there.
    """

    right: list[float]
    validation: float
    chosen: str = ""
    zeros: float = 0.0
    coefficients: Any = None  # mean over a set's samples and over blocks, [sets, vectors]


@torch.no_grad()
def accuracies(setting: Setting, part: str, c: Coefficients, vectors: TaskVectors | None = None) -> list[float]:
    """Of each set, with coefficients of all samples or of each."""
    of, found = setting.parts[part], []
    for at in torch.arange(len(of.labels)).split(128):
        own = c[at] if c.ndim == 3 else c
        h = weights.forward(setting.base, vtvc.rows(of.inputs, at), vectors or setting.vectors, own)
        found.append(setting.heads.right(h, of.sets[at], of.labels[at]))
    right = torch.cat(found).double()
    return [right[of.sets == at].mean().item() for at in range(len(setting.names))]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def added(setting: Setting, way: str) -> Found:
    """Task addition: one composed model (or one for each sample) for all sets."""
    if way in LEARNED:
        return _learned(setting, LEARNED[way])
    blocks, count = len(setting.vectors.blocks()), len(setting.vectors)
    if way == "zero-shot":
        return _found(setting, lambda part: torch.zeros(count, blocks))
    if way == "task arithmetic":
        tried = {s: mean(accuracies(setting, "select", torch.full((count, blocks), s))) for s in SCALES}
        best = max(tried, key=lambda s: tried[s])
        return _found(setting, lambda part: torch.full((count, blocks), best), f"scale {best}")
    told = _routes(setting) if way == "router" else {name: part.sets for name, part in setting.parts.items()}
    return _found(setting, lambda part: torch.eye(count)[told[part]].unsqueeze(-1).expand(-1, -1, blocks).contiguous())


def _routes(setting: Setting) -> dict[str, Tensor]:
    """The set of each sample by a logistic regression on its feature."""
    w, b = regression(setting.parts["compose"].features, setting.parts["compose"].sets)
    return {name: (part.features @ w.T + b).argmax(dim=1) for name, part in setting.parts.items()}


def _learned(setting: Setting, kind: Kind) -> Found:
    """The rate is the one of the highest mean accuracy on the select part."""
    fits = {lr: _fit(setting, kind, lr) for lr in RATES.get(kind, AMORTISED)}
    tried = {lr: mean(accuracies(setting, "select", _coefficients(setting, "select", fit))) for lr, fit in fits.items()}
    best = max(tried, key=lambda lr: tried[lr])
    fits[best].save(setting.folder / f"{kind}.safetensors")
    return _found(setting, lambda part: _coefficients(setting, part, fits[best]), f"lr {best:g}")


def _fit(setting: Setting, kind: Kind, lr: float) -> Posterior:
    learn = setting.parts["compose"]

    def loss(h: Tensor, at: Tensor) -> Tensor:
        return setting.heads.losses(h, learn.sets[at], learn.labels[at])

    shared: dict[str, Any] = dict(weight_decay=0.1, clip=1.0) if kind == "shared" else {}
    return vtvc.fit(
        setting.base, setting.vectors, learn.inputs, loss, posterior=kind, features=learn.features, lr=lr,
        epochs=2 * setting.epochs if kind == "shared" else setting.epochs, seed=setting.seed,
        checkpoint=setting.folder / "fits" / f"{kind}-{lr:g}.safetensors", progress=setting.progress, **shared,
    )  # fmt: skip


def _coefficients(setting: Setting, part: str, fit: Posterior) -> Coefficients:
    """Shared ones once: one merge serves all samples."""
    return fit.shared.detach() if fit.kind == "shared" else fit.coefficients(setting.parts[part].features)


def _found(setting: Setting, of: Callable[[str], Coefficients], chosen: str = "") -> Found:
    c, test = of("test"), setting.parts["test"]
    by_sample = c.mean(dim=-1).expand(len(test.labels), -1)
    by_set = [by_sample[test.sets == at].mean(dim=0).tolist() for at in range(len(setting.names))]
    validation = mean(accuracies(setting, "select", of("select")))
    return Found(accuracies(setting, "test", c), validation, chosen, (c == 0).double().mean().item(), by_set)


# --- negation ---

NEGATIONS: dict[str, Kind | None] = {"scalar": None, "gated (VTVC)": "gated"}
STRENGTHS = {"scalar": SCALES, "gated (VTVC)": [0.25 * i for i in range(13)]}
KEPT = 0.95  # of the base's accuracy on the other sets, on the select part


@dataclass(frozen=True)
class Forgotten:
    """target, control: accuracy on the test part of the set to be forgotten, and of the others (mean). strength: times
    the coefficients, chosen on the select part: the lowest target accuracy among those that keep 95% of the control.
    """

    target: float
    control: float
    base_target: float
    base_control: float
    chance: float
    strength: float


def negated(setting: Setting, target: int, way: str) -> Forgotten:
    """Task negation with the target's vector alone.

    Learned ones are trained towards the even distribution over the target's classes and the labels of all other sets.
    """
    vector, kind = setting.vectors[setting.names[target]], NEGATIONS[way]
    blocks = len(vector.blocks())
    unit: Callable[[str], Coefficients] = lambda part: torch.full((1, blocks), -1.0)  # noqa: E731
    if kind is not None:
        fit = _unlearning(setting, target, vector, kind)
        unit = lambda part: _coefficients(setting, part, fit)  # noqa: E731

    def scores(part: str, strength: float) -> tuple[float, float]:
        right = accuracies(setting, part, strength * unit(part), vector)
        return right[target], mean([right[at] for at in range(len(right)) if at != target])

    tried = {s: scores("select", s) for s in STRENGTHS[way]}
    keeping = [s for s in tried if tried[s][1] >= KEPT * tried[0.0][1]]
    best = min(keeping, key=lambda s: tried[s][0])
    labels = setting.parts["test"].labels[setting.parts["test"].sets == target]
    chance = labels.bincount().max().item() / len(labels)
    return Forgotten(*scores("test", best), *scores("test", 0.0), chance, best)


def _unlearning(setting: Setting, target: int, vector: TaskVectors, kind: Kind) -> Posterior:
    learn, others = setting.parts["compose"], len(setting.names) - 1

    def loss(h: Tensor, at: Tensor) -> Tensor:
        sets, labels = learn.sets[at], learn.labels[at]
        kept, even = setting.heads.losses(h, sets, labels), setting.heads.even(h, sets)
        return torch.where(sets == target, others * even, kept)

    return vtvc.fit(
        setting.base, vector, learn.inputs, loss, posterior=kind, features=learn.features, epochs=setting.forget_epochs,
        constants=vtvc.Constants(mean=-0.15), seed=setting.seed, progress=setting.progress,
        checkpoint=setting.folder / "fits" / f"negation-{setting.names[target]}-{kind}.safetensors",
    )  # fmt: skip
