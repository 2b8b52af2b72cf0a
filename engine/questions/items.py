"""The items of a ranking, and runs with some of them kept and all others ablated: a row a choice, one pass a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.core.budget import Budget
from engine.core.checking import able
from engine.core.patches import Patch
from engine.core.prefix import Prefix
from engine.progress import track
from engine.questions.asked import Asked, read_prompts
from engine.questions.edges.graph import Graph
from engine.questions.edges.pairs import Pairs, read_pairs
from engine.questions.edges.runs import edge_runs
from engine.questions.effects import Effects, Ranking
from engine.questions.groups import Units, existing
from engine.questions.metrics import Metric
from engine.questions.origins import Ablation, Origin, read_origin
from engine.questions.runs import Runs
from engine.questions.scoring import Answers, Scoring, read_scoring
from engine.questions.where import Places, read_where
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike, Site
from models.shapes import Bool, Float, Int, Integer


@dataclass(frozen=True, eq=False)
class Items:
    """Units of one or several rankings, as one; or edges.

    units: of each ranking, at its site. order: the items, the first of the ranking first. names: by item.
    graph: of edges.
    """

    sites: tuple[Site, ...]
    units: tuple[Units, ...]
    order: Int[Tensor, " items"]
    names: list[str]
    graph: Graph | None = None

    def __len__(self) -> int:
        return len(self.order)

    @classmethod
    def of(cls, model: Model, ranking: Effects | Sequence[Effects], by: Ranking) -> Items:
        """Raises ValueError for effects that are not of units or groups of units of this model, or share units."""
        each = [ranking] if isinstance(ranking, Effects) else list(ranking)
        if not each or any(not isinstance(one, Effects) for one in each):
            raise ValueError(f"a ranking must be effects, of one sweep or several, got {ranking!r:.80}")
        if by_position := [one for one in each if one.positions is not None]:
            raise ValueError(f"a circuit is of units at all tokens, the ranking is by positions: {by_position[0]!r}")
        names = [name for one in each for name in _names(one)]
        means = torch.cat([one.mean.flatten() for one in each])
        order = Effects(means[None], torch.zeros(1, dtype=torch.float64), groups=names)._best(len(means), by)
        if any("->" in name for name in names) and not any(isinstance(one.groups, Mapping) for one in each):
            graph = Graph.of(model)
            if names != graph.edges:
                raise ValueError(f"a ranking of edges must be of all {len(graph.edges)} edges of {model.name} alone")
            return cls((), (), torch.tensor(order), names, graph)
        units = [_units(model, one) for one in each]
        _check_apart([one.site for one in each], units)
        return cls(tuple(one.site for one in each), tuple(units), torch.tensor(order), names)

    def first(self, count: int) -> Bool[Tensor, " items"]:
        """The first so many of the ranking. Raises ValueError for more than there are."""
        if count > len(self):
            raise ValueError(
                f"a circuit must be of at most {len(self)} items, which is how many there are, got {count}"
            )
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[self.order[:count]] = True
        return kept

    def ranked(self) -> list[str]:
        return [self.names[i] for i in self.order.tolist()]

    def ablated(self, kept: Bool[Tensor, "rows items"]) -> list[Bool[Tensor, "rows layers units"]]:
        """Of each ranking's site, what is ablated where only some of the items are kept."""
        found, start = [], 0
        for units in self.units:
            out = ~kept[:, start : start + len(units)]
            start += len(units)
            if units.masks is None:
                shape = (units.size.n_layers, units.size.units)
                found.append(out.unflatten(1, shape) & existing(units.size))
            else:
                found.append(torch.einsum("ri,ilu->rlu", out.float(), units.masks.float()) > 0)
        return found


def _units(model: Model, effects: Effects) -> Units:
    size = model.site(effects.site)
    if effects.groups is None:
        shape = (size.n_layers, size.units) if size.units > 1 else (size.n_layers,)
        if tuple(effects.patched.shape[1:]) != shape:
            raise ValueError(f"a ranking of {effects.site} must be of {list(shape)} units of {model.name}: {effects!r}")
        return Units(size)
    if not isinstance(effects.groups, Mapping):
        raise ValueError(f"a ranking of groups needs their masks, these have names alone: {effects!r}")
    masks = torch.stack(list(effects.groups.values()))
    if tuple(masks.shape[1:]) != (size.n_layers, size.units):
        raise ValueError(f"groups of {effects.site} must be masks {[size.n_layers, size.units]}: {effects!r}")
    return Units(size, masks, tuple(effects.groups))


def _check_apart(sites: Sequence[Site], units: Sequence[Units]) -> None:
    """Raises ValueError for a unit that several items have: kept by one, it would be ablated by another."""
    times: dict[Site, Tensor] = {}
    for site, one in zip(sites, units, strict=True):
        here = existing(one.size).int()
        times[site] = times.get(site, 0) + (here if one.masks is None else one.masks.int().sum(dim=0) * here)
        if shared := (times[site] > 1).nonzero().tolist():
            raise ValueError(
                f"a unit must be in one item of a ranking, {shared[0]} (layer, unit) of {site} is in several"
            )


def _names(effects: Effects) -> list[str]:
    """As nodes are called: "a3.h1", "m3"; units of other sites by site."""
    if effects.groups is not None:
        return list(effects.groups)
    if effects.site == "z":
        return [f"a{layer}.h{head}" for layer, head in effects._units]
    if effects.site == "mlp_out":
        return [f"m{layer}" for layer in effects._units]
    return [f"{effects.site} {'.'.join(map(str, u)) if isinstance(u, tuple) else u}" for u in effects._units]


@dataclass(eq=False)
class OfEdges:
    """Edges that are not kept carry what they do in the source (`engine.edge_runs`)."""

    pairs: Pairs
    graph: Graph
    memory: Integer | None
    known: dict[str, Any]

    @property
    def scoring(self) -> Scoring:
        return self.pairs.scoring

    def run(self, kept: Bool[Tensor, "rows items"], progress: bool) -> Float[Tensor, "prompts rows"]:
        """The metric of each prompt with some edges kept; in the first row all of them."""
        keep = torch.zeros(len(kept), *self.graph.exists.shape, dtype=torch.bool)
        keep[:, self.graph.exists] = kept
        model, found = self.pairs.prompts[0].model, []
        for n in track(range(len(self.pairs.prompts)), "circuits of edges", progress):
            logits = edge_runs(model, self.pairs.prompts[n], self.pairs.sources[n], keep, memory=self.memory)  # type: ignore[arg-type]
            found.append(self.pairs.scores(n, logits, logits[0]).double().cpu())
        return torch.stack(found)


@dataclass(eq=False)
class OfUnits:
    """Prompts, what scores them, and what ablated items put out: of each site where, and from which origin."""

    prompts: list[Prefix]
    scoring: Scoring
    items: Items
    origins: list[Origin]
    budget: Budget
    known: dict[str, Any]

    @torch.no_grad()
    def run(self, kept: Bool[Tensor, "rows items"], progress: bool) -> Float[Tensor, "prompts rows"]:
        """The metric of each prompt with some items kept; in the first row all of them."""
        masks = self.items.ablated(kept)
        found = torch.empty(len(self.prompts), len(kept), dtype=torch.float64)
        able(self.prompts[0].model, self.prompts, layered=True, sites=set(self.items.sites))
        for n in track(range(len(self.prompts)), f"circuits of {len(self.items)} items", progress):
            prompt = self.prompts[n]
            (spot,) = self.origins[0].where.at(n, len(prompt.tokens))
            values = [origin.into(n)[0] for origin in self.origins]  # each [1, tokens, L, U, W]
            clean: list[Tensor] = []
            run = partial(self._part, n, masks, values, spot, clean, found)
            more = sum(4 * mask[0].numel() for mask in masks)
            Runs(self.scoring, n, prompt, min(spot)).in_passes(len(kept), self.budget, run, row_bytes=more)
        return found

    def _part(
        self,
        n: int,
        masks: Sequence[Tensor],
        values: Sequence[Tensor],
        spot: Sequence[int],
        clean: list[Tensor],
        found: Tensor,
        runs: Runs,
        some: slice,
    ) -> None:
        patches = [
            Patch(site, mask[some], new, spot) for site, mask, new in zip(self.items.sites, masks, values, strict=True)
        ]
        scores, logits = runs.scores(clean[0] if clean else None, patches)
        if not clean:
            clean.append(logits[0].clone())
        found[n, some] = scores.double().cpu()


def read_setting(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    items: Items,
    values: Ablation | None,
    source: Sequence[PromptLike] | None,
    metric: Metric | Callable[[Tensor], Tensor] = "logit_difference",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    positions: Places = "together",
    memory: Integer | None = None,
    seed: Integer = 0,
) -> OfUnits | OfEdges:
    """Raises what `engine.sweep` raises, before anything runs; ValueError for several positions, or, of edges, for
    anything but a source at all tokens.
    """
    if items.graph is not None:
        if values is not None or positions != "together":
            raise ValueError(
                f"edges are given what they carry in a source, at all tokens: got {values!r}, {positions!r}"
            )
        pairs = read_pairs(model, prompts, source, metric, targets, others, scored)
        return OfEdges(pairs, items.graph, memory, pairs.known | {"site": "edges"})
    given, ready, targets = read_prompts(model, prompts, targets)
    scoring = read_scoring(model, given, metric, targets, others, scored)
    wheres = [read_where(ready, site, positions) for site in items.sites]
    if wheres[0].names is not None:
        raise ValueError(f"items are ablated at one token, or at all together, got positions {wheres[0].names}")
    origins = [read_origin(ready, where, values, source, seed=seed) for where in wheres]
    known = [Asked(ready, where, origin, scoring).known for where, origin in zip(wheres, origins, strict=True)]
    sites = {"site": list(items.sites)}
    return OfUnits(ready, scoring, items, origins, Budget(model, memory), known[0] | sites | {"prompts": len(ready)})
