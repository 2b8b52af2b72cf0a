"""Circuits: how much of a model's answer do the first items of a ranking carry, all others being ablated?

    f(C)  =  (m(C) - m(nothing)) / (m(everything) - m(nothing))

m(C) is the mean metric over prompts with all ranked items but those of the circuit C ablated: their activations are
those of the source run, the mean over prompts, or zero, at every token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.artifacts import load_tensors, save_tensors
from engine.questions.effects import Effects, Ranking
from engine.questions.items import Items, read_setting
from engine.questions.metrics import Metric
from engine.questions.origins import Ablation
from engine.questions.scoring import Answers
from engine.questions.statistics import needed
from engine.questions.where import Places
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike
from models.reading import read_int, read_seed
from models.shapes import Bool, Float, Integer

if TYPE_CHECKING:
    import pandas

# Shares of the items that are kept, as MIB has them (its circuit localization track, arXiv 2504.13151).
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much circuits of several sizes carry.

    sizes:  shares of the items that are kept, ascending. counts: how many items that are.
    metric: of each prompt, by size. full, empty: with everything kept, and nothing.
    items:  names, the first of the ranking first. metadata: what else must be remembered; JSON.
    """

    sizes: Sequence[float]
    counts: Sequence[int]
    metric: Float[Tensor, "prompts sizes"]
    full: Float[Tensor, " prompts"]
    empty: Float[Tensor, " prompts"]
    items: Sequence[str] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Faithfulness of {len(self.metric)} prompts, {len(self.sizes)} sizes of {len(self.items)} items: "
            f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}"
        )

    @property
    def faithfulness(self) -> Float[Tensor, " sizes"]:
        """0: as nothing kept; 1: as the whole model; of the mean metric over prompts.

        NaN, with a warning, where both differ by no more than float32 rounds.
        """
        full, empty = self.full.mean(), self.empty.mean()
        if (full - empty).abs() <= 4 * torch.finfo(torch.float32).eps * torch.maximum(full.abs(), empty.abs()):
            warnings.warn("faithfulness is NaN: the metric is the same with everything kept and nothing", stacklevel=2)
            return torch.full_like(self.metric[0], torch.nan)
        return self._shares(self.metric.mean(dim=0), full, empty)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under the faithfulness, by trapezoids between the sizes. Higher is
        better: a circuit may do more than the model. NaN of fewer than two sizes, which enclose no area.

        Source: MIB, A Mechanistic Interpretability Benchmark (arXiv 2504.13151), section 3.
        """
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area between the faithfulness and 1. 0 is best: all circuits do as the model.

        NaN of fewer than two sizes.
        """
        return self._area((1 - self.faithfulness).abs())

    def interval(
        self, level: float = 0.95, resamples: Integer = 2_000, seed: Integer = 0
    ) -> tuple[Float[Tensor, " sizes"], Float[Tensor, " sizes"]]:
        """Low and high end of the bootstrap interval of the faithfulness: prompts are resampled, percentiles.

        Raises ValueError for one prompt, or a level that is not between 0 and 1.
        """
        n = len(self.metric)
        if n < 2 or not 0 < level < 1:
            raise ValueError(f"an interval needs 2 prompts and a level between 0 and 1, got {n} and {level}")
        random = torch.Generator().manual_seed(read_seed(seed))
        drawn = torch.randint(n, (read_int(resamples, "resamples"), n), generator=random)
        means = [x[drawn].mean(dim=1) for x in (self.metric, self.full[:, None], self.empty[:, None])]
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = self._shares(*means).quantile(tails, dim=0)
        return low, high

    def to_dataframe(self) -> pandas.DataFrame:
        """A row a size: size, items, metric, faithfulness. Raises ImportError without pandas."""
        columns = dict(size=self.sizes, items=self.counts, metric=self.metric.mean(dim=0).tolist())
        return needed("pandas", "data frames").DataFrame(columns | {"faithfulness": self.faithfulness.tolist()})

    def plot(self, path: str | Path, title: str = "") -> None:
        """Faithfulness by size as PNG, with its interval. Raises ImportError without matplotlib."""
        from engine import plots

        needed("matplotlib", "pictures", extra="plots")
        band = self.interval() if len(self.metric) > 1 else None
        plots.faithfulness(path, self.sizes, self.faithfulness, band, title)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, whole or not at all. Raises OSError if it cannot be written."""
        tensors = {"metric": self.metric, "full": self.full, "empty": self.empty}
        described = dict(sizes=list(self.sizes), counts=list(self.counts), items=list(self.items))
        save_tensors(path, tensors, described | {"metadata": self.metadata})

    @classmethod
    def load(cls, path: str | Path) -> Faithfulness:
        """Read what was saved. Raises FileNotFoundError; ValueError for another file."""
        tensors, described = load_tensors(path, ("metric", "full", "empty"))
        try:
            return cls(**{**tensors, **described})
        except TypeError as error:
            raise ValueError(f"{path} holds no faithfulness as it is saved: {error}") from error

    def _area(self, height: Float[Tensor, " sizes"]) -> float:
        if len(self.sizes) < 2:
            return float("nan")
        return float(torch.trapezoid(height, torch.tensor(self.sizes, dtype=height.dtype)))

    @staticmethod
    def _shares(metric: Tensor, full: Tensor, empty: Tensor) -> Tensor:
        return (metric - empty) / (full - empty)


@dataclass(frozen=True, eq=False)
class Completeness:
    """Subsets K of a circuit C taken out of it, and out of the whole model M.

    circuit, full: the metric of C without K and of M without K. subsets: which items of C are in each K.
    """

    circuit: Float[Tensor, "prompts subsets"]
    full: Float[Tensor, "prompts subsets"]
    subsets: Bool[Tensor, "subsets items"]
    items: Sequence[str]

    @property
    def incompleteness(self) -> Float[Tensor, " subsets"]:
        """|F(C without K) - F(M without K)|, F the mean metric over prompts; 0 for a complete circuit."""
        return (self.circuit.mean(dim=0) - self.full.mean(dim=0)).abs()


def faithfulness(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    ranking: Effects | Sequence[Effects],
    values: Ablation | None = None,
    *,
    source: Sequence[PromptLike] | None = None,
    sizes: Sequence[float] = SIZES,
    by: Ranking = "absolute",
    metric: Metric | Callable[[Tensor], Tensor] = "logit_difference",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    positions: Places = "together",
    memory: Integer | None = None,
    seed: Integer = 0,
    progress: bool = True,
) -> Faithfulness:
    """How much of the metric the first items of a ranking keep up, all other ranked items ablated: a curve over sizes.

    ranking:   effects of single units of a site, or of groups with masks; several of different sites are ranked as one;
               or of edges (`engine.attribute(..., edges=True)`). Better of other prompts than these.
    values, source: what ablated items put out: "zero", "mean" or "resample", or what they do in a source, a prompt for
               each prompt. Edges: source only.
    sizes:     shares of the items that are kept, of each so many as fit (default 0.1% to 100%, as MIB).
    by:        as `Effects.top`: largest first by "absolute" effect; of a ranking by noising, "negative": those whose
               ablation lowers the metric most.
    positions: tokens at which items are ablated. Default: all.
    The other arguments are those of `engine.sweep`. All sizes of a prompt are rows of one pass.

    Raises ValueError before anything runs for a ranking by positions, of names, or of items that share units (it would
    not say whether one is kept), sizes that do not ascend within 0 to 1, and what `engine.sweep` refuses.

    Source: faithfulness, CPR and CMD of MIB (arXiv 2504.13151), section 3; faithfulness of nodes, Interpretability in
    the Wild (arXiv 2211.00593), section 4.

    >>> ranked = engine.sweep(model, [Example("Q: hot\\nA:", " ")], "zero", progress=False)
    >>> given = dict(sizes=(0.1, 1), metric="probability", progress=False)
    >>> engine.circuits.faithfulness(model, [Example("Q: hot\\nA:", " ")], ranked, "zero", **given).faithfulness[-1]
    tensor(1., dtype=torch.float64)
    """
    shares = [float(size) for size in sizes]
    if not shares or shares != sorted(shares) or not (shares[0] >= 0 and shares[-1] <= 1):
        raise ValueError(f"sizes must be shares of the items, ascending within 0 to 1, got {list(sizes)}")
    items = Items.of(model, ranking, by)
    setting = read_setting(
        model, prompts, items, values, source, metric, targets, others, scored, positions, memory, seed
    )
    counts = [int(share * len(items) + 1e-9) for share in shares]
    rows = list(dict.fromkeys([len(items), 0, *counts]))
    found = setting.run(torch.stack([items.first(count) for count in rows]), progress)
    metric_at = found[:, [rows.index(count) for count in counts]]
    return Faithfulness(
        shares, counts, metric_at, found[:, 0], found[:, 1], items.ranked(), setting.known | {"ranked": by}
    )


def completeness(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    ranking: Effects | Sequence[Effects],
    size: Integer,
    values: Ablation | None = None,
    *,
    source: Sequence[PromptLike] | None = None,
    subsets: Integer = 20,
    by: Ranking = "absolute",
    seed: Integer = 0,
    progress: bool = True,
    **asking: Any,
) -> Completeness:
    """Does a circuit, the first `size` items of a ranking, lose what the model loses without some of its items?

    subsets: how many are drawn, each item being in one with probability 1/2; the first is empty (default 20).
    The other arguments, metric, targets and so on, are those of `faithfulness`.

    Source: Interpretability in the Wild (arXiv 2211.00593), section 4.1.
    """
    items = Items.of(model, ranking, by)
    circuit = items.first(read_int(size, "size"))
    setting = read_setting(model, prompts, items, values, source, seed=seed, **asking)
    random = torch.Generator().manual_seed(read_seed(seed))
    out = torch.rand(read_int(subsets, "subsets"), len(items), generator=random) < 0.5
    out[0] = False
    out &= circuit
    found = setting.run(torch.cat([torch.ones_like(out[:1]), circuit & ~out, ~out]), progress)
    within, whole = found[:, 1:].chunk(2, dim=1)
    members = [i for i in items.order.tolist() if circuit[i]]
    return Completeness(within, whole, out[:, members], [items.names[i] for i in members])


def minimality(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    ranking: Effects | Sequence[Effects],
    size: Integer,
    values: Ablation | None = None,
    *,
    source: Sequence[PromptLike] | None = None,
    by: Ranking = "absolute",
    progress: bool = True,
    **asking: Any,
) -> Effects:
    """What does each item of a circuit, the first `size` of a ranking, do for it?

    `patched` is the metric of the circuit without the item, `clean` that of the whole circuit: an item without effect
    is not needed. The arguments, metric, targets and so on, are those of `faithfulness`.

    Source: Interpretability in the Wild (arXiv 2211.00593), section 4.2, there without a set K of other items as well.
    """
    items = Items.of(model, ranking, by)
    circuit = items.first(read_int(size, "size"))
    setting = read_setting(model, prompts, items, values, source, **asking)
    members = [i for i in items.order.tolist() if circuit[i]]
    without = circuit.repeat(len(members), 1)
    without[range(len(members)), members] = False
    found = setting.run(torch.cat([torch.ones_like(without[:1]), circuit[None], without]), progress)
    names = [items.names[i] for i in members]
    return Effects(found[:, 2:], found[:, 1], groups=names, metric=setting.scoring.metric, metadata=setting.known)
