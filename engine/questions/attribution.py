"""Attribution patching: the effect of every unit at once, estimated from gradients of the metric.

    effect[n, p, l, u]  =  sum_w  g[p, l, u, w] * (new - x)[p, l, u, w]

x are the activations of the patched token, new what a sweep would put there, and g the gradient of the metric with
respect to something added to x[l, u], later layers free to respond: of the unpatched run (steps = 1), or its mean over
a path (steps > 1).

The path is straight: at its point a, 0 <= a <= 1, every unit's output is shifted by a (new - x) at once, x being those
of the unpatched run. The k points are the midpoints a = (i - 1/2) / k. With enough of them the effects of all units sum
to the metric with all units shifted by new - x less that of the unpatched run (completeness of integrated gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.core.budget import Budget
from engine.core.checking import able
from engine.core.patches import Patch
from engine.progress import track
from engine.questions.asked import Asked, read_prompts
from engine.questions.edges.estimates import attribute_edges
from engine.questions.effects import Effects
from engine.questions.groups import existing, read_groups
from engine.questions.metrics import Metric
from engine.questions.origins import Ablation, read_origin
from engine.questions.runs import Runs
from engine.questions.scoring import Answers, read_scoring
from engine.questions.where import Places, computed, read_where
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike, Site, UnsupportedModelError
from models.reading import read_int
from models.shapes import Bool, Float, Integer


def attribute(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    values: Tensor | np.ndarray | Ablation | None = None,
    *,
    source: Sequence[PromptLike] | None = None,
    metric: Metric | Callable[[Tensor], Tensor] = "probability",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    site: Site = "z",
    positions: Places = -1,
    steps: Integer = 1,
    edges: bool = False,
    memory: Integer | None = None,
    seed: Integer = 0,
    progress: bool = True,
) -> Effects:
    """The effect of patching each unit alone, estimated for all units by one forward and one backward pass a prompt.

    The arguments are those of `engine.sweep`, which computes what is estimated here, and
    steps: 1: the gradient of the unpatched run (default), for all positions in one pass. More: its mean over so many
           points of the straight path on which all units are shifted at once by what patching each would change; all
           of them rows of one pass, a pass a position. Their effects sum to that of shifting all units; the effect of
           one unit alone may be estimated worse.

    edges: of the edges of the computational graph in place of units: `engine.attribute_edges`, of sources, at all
           tokens.

    Returns `Effects` as `engine.sweep` does, but `patched` is no run: it is clean plus the estimate, so that `effect`
    is the estimate. `clean` and `reference` are exact. Half-precision models give half-precision gradients.

    Raises ValueError, TypeError or IndexError as `engine.sweep`, and ValueError for "rank", which has no gradient, for
    "kl" with one step, whose gradient is 0 there, and fewer steps than one: all before anything runs. With the first
    prompt: UnsupportedModelError for a model without gradients (weights made in inference mode, layers that record
    none), ValueError for a metric of one's own that records none. Gradients of the weights are neither made nor
    changed, whether they require them or not.

    Source: Attribution Patching (Nanda, 2023), https://www.neelnanda.io/mechanistic-interpretability/attribution-patching;
    AtP* (arXiv 2403.00745); more than one step: integrated gradients (arXiv 1703.01365), as Have Faith in
    Faithfulness (arXiv 2403.17806) takes them, there along the path between two inputs.

    >>> estimated = engine.attribute(model, [Example("Q: hot\\nA:", " cold")], "zero", progress=False)
    >>> estimated.effect.shape == (1, model.shape.n_layers, model.shape.n_heads)
    True
    """
    if edges:
        if values is not None or site != "z" or positions not in (-1, "together"):
            raise ValueError(
                "edges are of all sites, patched at all tokens from a source: expected no values, site, positions"
            )
        asked_of = dict(metric=metric, targets=targets, others=others, scored=scored, memory=memory, progress=progress)
        return attribute_edges(model, prompts, source=source, steps=steps, **asked_of)  # type: ignore[arg-type]
    steps = read_int(steps, "steps")
    if metric == "rank":
        raise ValueError("'rank' has no gradient: take 'log_probability', or engine.sweep")
    if metric == "kl" and steps == 1:
        raise ValueError("the gradient of 'kl' is 0 at the unpatched run, where it is least: give steps > 1")
    with torch.inference_mode(False), torch.no_grad():
        given, ready, targets = read_prompts(model, prompts, targets)
        where = read_where(ready, site, positions)
        origin = read_origin(ready, where, values, source, seed=seed)
        asked = Asked(ready, where, origin, read_scoring(model, given, metric, targets, others, scored))
        budget, units = Budget(model, memory, graph=True), read_groups(model, "units", site)
        patched = torch.empty(len(ready), len(where.spots[0]), len(units), dtype=torch.float64)
        clean, reference = patched.new_empty(len(ready)), patched.new_empty(len(ready)) if origin.sources else None
        able(model, ready, sites={site})
        for n in track(range(len(ready)), "attribution", progress):
            spots = where.at(n, len(ready[n].tokens))
            prompt, (new, source_run) = computed(ready[n], min(map(min, spots))), origin.into(n)
            change = new.to(model.device) - where.activations(n, prompt)  # [spots, tokens, L, U, W]
            # Spots of a token each share a pass: at the unpatched run each gradient knows nothing of the others.
            alone = [[s] for s in range(len(spots))]
            for some in [list(range(len(spots)))] if steps == 1 and len(spots[0]) == 1 else alone:
                at = sorted({token for s in some for token in spots[s]})
                shifts = {token: x for s in some for token, x in zip(spots[s], change[s], strict=True)}
                runs = Runs(asked.scoring, n, prompt, at[0])
                gradient, score, logits = _gradient(
                    runs, site, at, torch.stack([shifts[t] for t in at]), existing(units.size), steps, budget
                )
                clean[n] = score
                for s in some:
                    mine = gradient[[at.index(token) for token in spots[s]]]  # [tokens, L, U, W]
                    patched[n, s] = clean[n] + (mine * change[s].double()).sum(dim=(0, -1)).flatten().cpu()
            if reference is not None and source_run is not None:
                reference[n] = Runs(asked.scoring, n, source_run).scores(logits)[0]
        estimate = {"estimate": "attribution patching", "steps": steps}
        return asked.effects(patched, clean, units, reference, metadata=estimate)


def _gradient(
    runs: Runs,
    site: Site,
    at: Sequence[int],
    difference: Float[Tensor, "tokens layers units width"],
    every: Bool[Tensor, "layers units"],
    steps: int,
    budget: Budget,
) -> tuple[Float[Tensor, "tokens layers units width"], Float[Tensor, ""], Float[Tensor, " vocab"]]:
    """The mean of the metric's gradient over the path; and of the unpatched run the metric and the logits."""
    # The first row is the unpatched run, of which more steps take no gradient.
    points = torch.cat([torch.zeros(1), (torch.arange(steps) + 0.5) / steps]) if steps > 1 else torch.zeros(1)
    total = torch.zeros_like(difference, dtype=torch.float64)
    clean: tuple[Tensor, Tensor] | None = None

    def run(runs: Runs, some: slice) -> None:
        nonlocal clean
        shift = points[some].to(difference)[:, None, None, None, None] * difference  # [rows, tokens, L, U, W]
        with torch.enable_grad():
            shift.requires_grad_()
            before = clean[1] if clean and some.start else None
            patch = Patch(site, every.expand(len(shift), -1, -1), shift, at, "add")
            scores, logits = runs.scores(before, [patch])
            gradient = _derivative(scores, shift)
            if gradient is None:
                raise _without(runs.prompt.model, recorded=_derivative(logits, shift) is not None)
        if not some.start:
            clean = scores[0].detach().clone(), logits[0].detach().clone()
        total.add_(gradient[1 if steps > 1 and not some.start else 0 :].double().sum(dim=0))

    try:
        runs.in_passes(len(points), budget, run)
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{runs.prompt.model.name} gives no gradients: it, or a prefix that was given, was made in inference mode"
        ) from error
    return total / steps, *clean  # type: ignore[misc]


def _derivative(of: Tensor, by: Tensor) -> Tensor | None:
    return torch.autograd.grad(of.sum(), by, allow_unused=True)[0] if of.requires_grad else None


def _without(model: Model, recorded: bool) -> ValueError:
    if recorded:
        return ValueError("the metric records no gradient: compute it from the logits by differentiable operations")
    return UnsupportedModelError(
        f"{model.name} gives no gradients: its layers record none (quantised ones, or under torch.no_grad)"
    )
