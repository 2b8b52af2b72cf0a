"""What patching single units of a site, or groups of them, does to a metric: effects over prompts, and how sure they
are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from engine.artifacts import load_tensors, save_tensors
from engine.questions.metrics import check_scores
from engine.questions.pages import Page
from engine.questions.statistics import Correction, bootstrap, sign_flips, spearman
from models import Site
from models.reading import read_int, read_tensor
from models.shapes import Bool, Float, Integer

if TYPE_CHECKING:
    import pandas

Ranking: TypeAlias = Literal["absolute", "positive", "negative"]


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """The metric of N prompts, patched unit by unit. A unit is a head, neuron or layer (of a site with one vector a
    layer), or a named group of them; at several positions, each of them is one unit more.

    patched:   metric of each patched run: [N, L, U], or [N, L] of a site with one unit a layer; [N, G] for G groups;
               with an axis for P positions after the first, [N, P, ...].
    clean:     metric of the unpatched run of each prompt.
    reference: metric of the run that the activations came from, where there is one.
    groups:    name and mask of each group, in the order of `patched`, or names alone; None for single units.
    positions: the tokens patched one at a time, as they were given, or their names; None if `patched` has no such
               dimension.
    metric:    its name, for tables and pictures.
    metadata:  model, prompts, values, whatever else must be remembered; JSON.
    site:      where units are (`engine.Patch`).
    tokens:    the text at each position, for pictures; None if prompts have no text, or not all the same length.

    Statistics are over prompts, in float64. Raises ValueError for shapes that do not fit, and for scores that are NaN
    or infinite, naming the prompts; TypeError for half precision.

    >>> effects = engine.Effects(torch.tensor([[[0.1, 0.7]], [[0.2, 0.5]]]), clean=torch.tensor([0.1, 0.1]))
    >>> effects.top(1)
    [(0, 1)]
    """

    patched: Float[Tensor, "prompts ..."]
    clean: Float[Tensor, " prompts"]
    reference: Float[Tensor, " prompts"] | None = None
    groups: Mapping[str, Bool[Tensor, "layers units"]] | Sequence[str] | None = None
    positions: Sequence[int | str] | None = None
    metric: str = "metric"
    metadata: dict[str, Any] = field(default_factory=dict)
    site: Site = "z"
    tokens: Sequence[str] | None = None

    def __post_init__(self) -> None:
        shape = list(self.patched.shape)
        if len(shape) != len(self._dimensions) or 0 in shape:
            raise ValueError(f"patched must have shape [{', '.join(self._dimensions)}], none of them 0, got {shape}")
        scores = {"patched": self.patched, "clean": self.clean}
        scores |= {} if self.reference is None else {"reference": self.reference}
        for name, tensor in scores.items():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} must be of float32 or float64, got {tensor.dtype}")
            if name != "patched" and list(tensor.shape) != shape[:1]:
                raise ValueError(f"{name} must have shape {shape[:1]}, one a prompt, got {list(tensor.shape)}")
            check_scores(tensor, f"{self.metric} of the {name} run")
        if self.positions is not None and len(self.positions) != shape[1]:
            raise ValueError(f"patched has {shape[1]} positions, but {len(self.positions)} were named")
        if self.tokens is not None and len(self.tokens) != len(self.positions or ()):
            raise ValueError(f"tokens must be one for each of the positions {self.positions}, got {self.tokens}")
        if self.groups is not None and len(self.groups) != shape[-1]:
            raise ValueError(f"patched has {shape[-1]} groups, but {len(self.groups)} were named")
        masks = list(self.groups.values()) if isinstance(self.groups, Mapping) else []
        if any(mask.dtype != torch.bool or mask.ndim != 2 or mask.shape != masks[0].shape for mask in masks):
            raise ValueError("groups must be bool masks [layers, units] of one shape")

    def __repr__(self) -> str:
        sizes = [f"{n} {what}" for n, what in zip(self.patched.shape, self._dimensions, strict=True)]
        means = self.mean
        reference = "" if self.reference is None else f", {self.reference.double().mean():.4g} at the reference"
        return (
            f"Effects on {self.metric}: {' x '.join(sizes)}; {self.clean.double().mean():.4g} unpatched{reference}; "
            f"mean effects {means.min():.4g} to {means.max():.4g}"
        )

    @property
    def effect(self) -> Float[Tensor, "prompts ..."]:
        """Of each prompt: patched - clean."""
        return self.patched - self._beside(self.clean)

    @property
    def normalised(self) -> Float[Tensor, "prompts ..."]:
        """(patched - clean) / (reference - clean): 0 where the patch did nothing, 1 where it did all of it.

        NaN for prompts whose reference and clean differ by no more than float32 rounds, with a warning that names them.
        Raises ValueError without a reference.
        """
        if self.reference is None:
            raise ValueError("normalised effects need the metric of a reference run; these effects have none")
        span = self.reference - self.clean
        # Of float32 whatever holds the scores: most models compute in no more.
        rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(self.reference.abs(), self.clean.abs())
        undefined = span.abs() <= rounding
        if undefined.any():
            prompts = undefined.nonzero().flatten().tolist()
            warnings.warn(
                f"normalised effects of prompts {prompts} are NaN: reference and clean run score the same", stacklevel=2
            )
        return self.effect / self._beside(span.masked_fill(undefined, torch.nan))

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """Mean effect of each unit, over prompts."""
        return self._over_prompts.mean(dim=0).reshape(self.patched.shape[1:])

    @property
    def standard_error(self) -> Float[Tensor, "..."]:
        """Of the mean: standard deviation over sqrt(N). Raises ValueError for one prompt."""
        x = self._several("a standard error")
        return (x.std(dim=0) / len(x) ** 0.5).reshape(self.patched.shape[1:])

    def interval(
        self, level: float = 0.95, resamples: Integer = 10_000, seed: Integer = 0
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Low and high end of the bootstrap interval of each unit's mean effect: prompts are resampled, BCa.

        Every unit is resampled alike; the same seed gives the same interval. Units whose effect is the same on all
        prompts get that point. Few prompts give intervals that are too narrow: 0.95 covers some 0.9 of the time at 10
        prompts of normal effects, 0.83 of skewed ones, and 0.94 and 0.92 at 100.

        Raises ValueError for one prompt or a level that is not between 0 and 1; ImportError without scipy.

        Source: Efron, Better bootstrap confidence intervals (JASA 82, 1987), as `scipy.stats.bootstrap` has it.

        >>> effects = engine.Effects(torch.rand(9, 2, 3), clean=torch.zeros(9))
        >>> low, high = effects.interval(resamples=999)
        """
        low, high = bootstrap(self._several("an interval"), level, resamples, seed)
        shape = self.patched.shape[1:]
        return low.reshape(shape), high.reshape(shape)

    def p_values(
        self, correction: Correction | None = "max", resamples: Integer = 10_000, seed: Integer = 0
    ) -> Float[Tensor, "..."]:
        """Two-sided sign-flip test, over prompts, that a unit's mean effect is zero, corrected for the number of units.

        The null hypothesis is an effect that is distributed evenly about zero. If N prompts have no more than
        `resamples` different flips, 2^(N-1), all of them are counted and p is exact; else that many are drawn by the
        seed.

        correction: "max"  each unit beside the largest statistic of all units in the same flip (Westfall and Young);
                    "holm" Holm's method: both bound the chance of any false discovery;
                    "fdr"  Benjamini and Hochberg's: bounds the share of false ones among the discoveries; needs scipy;
                    None   none: p of each unit by itself.

        The smallest p there can be is 2^-(N-1), or 1 / (resamples + 1): 0.002 for 10 prompts. Holm multiplies the
        smallest by the number of units, so few prompts on many units can never be significant; "max" does not.

        Raises ValueError for one prompt or an unknown correction.

        >>> effects = engine.Effects(torch.rand(9, 2, 3), clean=torch.zeros(9))
        >>> bool((effects.p_values() <= 0.05).all())
        True
        """
        return sign_flips(self._several("a test"), correction, resamples, seed).reshape(self.patched.shape[1:])

    def top(self, k: Integer, by: Ranking = "absolute") -> list[Any]:
        """The k units of the largest mean effect, largest first; of equal ones, the first.

        by: "absolute" size, whatever the sign; "positive": the most raising; "negative": the most lowering.

        Returns (layer, head) pairs or layers, as `engine.Patch` takes them, or names of groups; at several positions
        (position, layer, head), (position, layer) or (position, name). Raises ValueError for fewer than one or more
        than there are.
        """
        return [self._units[i] for i in self._best(k, by)]

    def rank_correlation(self, other: Effects | Float[Tensor, "..."]) -> float:
        """Spearman's correlation, over units, of the mean effects of two sweeps (or of an array of their shape).

        Raises ValueError for units that differ, fewer than two, or all of the same effect; ImportError without scipy.
        """
        if isinstance(other, Effects) and other._units != self._units:
            raise ValueError(f"both must have the same units: one is {self!r}, the other {other!r}")
        means = other.mean if isinstance(other, Effects) else torch.as_tensor(read_tensor(other, "effects"))
        return spearman(self.mean, means.detach().cpu().double())

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each prompt and unit: prompt, position, layer and head, neuron or group, patched, clean, effect,
        and with a reference, reference and normalised. Raises ImportError without pandas.
        """
        from engine.questions import tables

        return tables.of_prompts(self)

    def summary(
        self,
        level: float = 0.95,
        correction: Correction | None = "max",
        resamples: Integer = 10_000,
        seed: Integer = 0,
    ) -> pandas.DataFrame:
        """A row for each unit: position, layer and head, neuron or group, mean effect, standard_error, low, high, p.

        Raises ValueError for one prompt; ImportError without pandas or scipy.
        """
        from engine.questions import tables

        return tables.of_units(self, level, correction, resamples, seed)

    def heatmap(self, path: str | Path, top: int = 10, by: Ranking = "absolute", title: str = "") -> None:
        """Map of the mean effects as PNG; the `top` units carry a dot (0: none).

        One unit a layer: tokens down (their text, or names of positions), layers across. Heads: heads down, layers
        across, a map a position; neurons: layers down. Groups at several positions: tokens down, groups across.

        Raises ValueError for groups without positions, which have no place on a map, and for more than a picture holds;
        ImportError without matplotlib.

        >>> effects = engine.Effects(torch.rand(9, 2, 30), torch.zeros(9), positions=[3, 4], tokens=[" Paris", "."])
        >>> effects.heatmap("tracing.png", title="Where the city is read")
        """
        from engine.questions import maps

        maps.draw(self, path, top, by, title)

    def show(
        self,
        path: str | Path | None = None,
        top: Integer = 1000,
        level: float = 0.95,
        correction: Correction | None = "max",
        resamples: Integer = 10_000,
        seed: Integer = 0,
        title: str = "",
    ) -> Page:
        """An interactive page: the maps of `heatmap`, coloured by effect, p-value or interval, and a table of the `top`
        units that sorts by any column; all of a unit's numbers under the mouse. It is one HTML file that needs no
        network, written to `path` if that is given, and shows itself in a notebook.

        Options and numbers are those of `summary`, to six digits; of one prompt there are effects alone. 4,320 units on
        20 prompts take some ten seconds, a tenth with resamples=999. More than 10,000 units, and groups without
        positions, are a table alone. Raises ValueError for a `top` below 1, and as `summary`; ImportError without
        scipy; OSError if the file cannot be written.

        >>> effects = engine.Effects(torch.rand(9, 2, 3), clean=torch.zeros(9))
        >>> page = effects.show("effects.html", resamples=999)
        """
        from engine.questions import showing

        page = showing.page_of(self, top, level, correction, resamples, seed, title)
        if path is not None:
            page.save(path)
        return page

    def _repr_html_(self) -> str:
        from engine.questions import tables

        return tables.brief(self)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, whole or not at all. Raises OSError if it cannot be written."""
        tensors = {"patched": self.patched, "clean": self.clean}
        tensors |= {} if self.reference is None else {"reference": self.reference}
        tensors |= {"groups": torch.stack(list(self.groups.values()))} if isinstance(self.groups, Mapping) else {}
        described = {
            "metric": self.metric,
            "positions": None if self.positions is None else list(self.positions),
            "groups": None if self.groups is None else list(self.groups),
            "masks": isinstance(self.groups, Mapping),
            "reference": self.reference is not None,
            "metadata": self.metadata,
            "site": self.site,
            "tokens": None if self.tokens is None else list(self.tokens),
        }
        save_tensors(path, tensors, described)

    @classmethod
    def load(cls, path: str | Path) -> Effects:
        """Read saved effects, bit by bit what was saved. Raises FileNotFoundError; ValueError for another file."""
        tensors, described = load_tensors(path, ("patched", "clean"))
        try:
            named = described["groups"]
            masked = described.get("masks", named is not None)
            more = load_tensors(path, ("reference",) * described["reference"] + ("groups",) * masked)[0]
            groups = dict(zip(named, more["groups"], strict=True)) if masked else named
            return cls(
                tensors["patched"],
                tensors["clean"],
                more.get("reference"),
                groups,
                described["positions"],
                described["metric"],
                described["metadata"],
                described.get("site", "z"),
                described.get("tokens"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no effects as they are saved: {error!r}") from error

    @property
    def _dimensions(self) -> list[str]:
        names = ["prompts", *(["positions"] if self.positions is not None else [])]
        if self.groups is not None:
            return [*names, "groups"]
        own = ["layers", "neurons" if self.site == "mlp_act" else "heads"]
        return names + (own[:1] if self.patched.ndim == len(names) + 1 else own)

    @cached_property
    def _units(self) -> list[Any]:
        """What each unit is called, in the order of `patched` flattened."""
        sizes = self.patched.shape[1 if self.positions is None else 2 :]
        if self.groups is not None:
            own: list[Any] = list(self.groups)
        else:
            own = list(range(sizes[0])) if len(sizes) == 1 else list(product(*(range(n) for n in sizes)))
        if self.positions is None:
            return own
        return [(p, *unit) if isinstance(unit, tuple) else (p, unit) for p in self.positions for unit in own]

    @property
    def _over_prompts(self) -> Float[Tensor, "prompts units"]:
        effect = self.patched.detach().cpu().double() - self._beside(self.clean.detach().cpu().double())
        return effect.flatten(1)

    def _several(self, what: str) -> Float[Tensor, "prompts units"]:
        if len(self.patched) < 2:
            raise ValueError(f"{what} needs the effects of at least 2 prompts, got 1")
        return self._over_prompts

    def _beside(self, one_a_prompt: Float[Tensor, " prompts"]) -> Float[Tensor, "prompts ..."]:
        return one_a_prompt.reshape(-1, *[1] * (self.patched.ndim - 1))

    def _best(self, k: Integer, by: Ranking) -> list[int]:
        if by not in get_args(Ranking):
            raise ValueError(f"by must be one of {get_args(Ranking)}, got {by!r}")
        means, k = self.mean.flatten(), read_int(k, "k", None)
        if not 1 <= k <= len(means):
            raise ValueError(f"the top must be of 1 to {len(means)} units, which is how many there are, got {k}")
        keys = {"absolute": means.abs(), "positive": means, "negative": -means}[by]
        return keys.sort(descending=True, stable=True).indices[:k].tolist()
