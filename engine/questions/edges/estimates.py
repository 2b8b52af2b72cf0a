"""Edge attribution patching: the effect of every edge of the computational graph, estimated from gradients.

    score[u -> v] = sum over tokens t and i  (out_u of the source - out_u of the prompt)[t, i] * g_v[t, i]

out_u is what a sender gives to the residual stream, and g_v the gradient of the metric with respect to what a receiver
is given: of the unpatched run (steps = 1, EAP), or its mean over a path of input embeddings (steps > 1, EAP-IG).

The gradient at the input of one head's queries is that at the queries, of this head alone, taken back through the
projection and the norm between: a short piece of the graph, by which all receivers of a layer are computed at once.
All scores are one product of matrices [senders, tokens * d_model] and [tokens * d_model, receivers].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.core.budget import Budget
from engine.core.edits import keeping
from engine.core.prefix import Prefix
from engine.progress import track
from engine.questions.edges.graph import Graph
from engine.questions.edges.pairs import read_pairs
from engine.questions.edges.senders import Run, check_sums, record, wide
from engine.questions.effects import Effects
from engine.questions.metrics import Metric
from engine.questions.scoring import Answers
from engine.tasks.scoring import ExampleLike, Scored
from models import Edits, Model, PromptLike, Site, UnsupportedModelError
from models.reading import read_int
from models.shapes import Float, Integer


def attribute_edges(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    *,
    source: Sequence[PromptLike],
    metric: Metric | Callable[[Tensor], Tensor] = "probability",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    steps: Integer = 1,
    memory: Integer | None = None,
    progress: bool = True,
) -> Effects:
    """The effect of giving each edge alone what it carries in the source, at all tokens, estimated for all edges.

    prompts: an `Example`, or a plain (prompt, answer) pair, brings its target.
    source:  a prompt for each prompt, of as many tokens; its own metric is the result's reference.
    metric, targets, others: as `engine.sweep` has them, but "rank", which has no gradient.
    scored:  "first_token", of an answer of several tokens: edges are scored by one. Default: the whole answer, then of
             one token.
    steps:   1: the gradient of the unpatched run (EAP; default). More: its mean over k points of the straight path
             from the source's input embeddings to the prompt's (EAP-IG), all of them rows of one forward. The points
             are the midpoints a = (i - 1/2) / k, i = 1..k, as in `engine.attribute`; in the paper a = i / k with i =
             1..k, in its authors' code i = 0..k-1.
    memory:  bytes that rows may take; default an eighth of what is free.

    Returns `Effects` whose groups are the edges by name, in the order of `Graph.edges`. `patched` is no run: it is
    clean plus the estimate, so that `effect` is the estimate; `clean` and `reference` are exact. Gradients of the
    weights are neither made nor changed.

    Raises ValueError, TypeError or IndexError before anything runs for what does not fit; UnsupportedModelError for a
    model that lacks a site, whose residual stream is not the sum of what heads and MLPs give (norms behind them, as
    Gemma2's), or without gradients.

    Source: Attribution Patching Outperforms Automated Circuit Discovery (arXiv 2310.10348), section 3; Have Faith in
    Faithfulness (arXiv 2403.17806), section 3.

    >>> pair = dict(source=["Q: cold\\nA:"], targets=[" cold"], metric="log_probability", progress=False)
    >>> effects = engine.attribute_edges(model, ["Q: hot\\nA:"], **pair)
    >>> len(effects.groups), len(effects.top(3))
    (70651, 3)
    """
    steps = read_int(steps, "steps")
    if metric == "rank":
        raise ValueError("'rank' has no gradient: take 'log_probability', or engine.exact_edges")
    if metric == "kl" and steps == 1:
        raise ValueError("the gradient of 'kl' is 0 at the unpatched run, where it is least: give steps > 1")
    with torch.inference_mode(False), torch.no_grad():
        pairs = read_pairs(model, prompts, source, metric, targets, others, scored)
        budget = Budget(model, memory, graph=True)
        graph = Graph.of(model)
        patched = torch.empty(len(pairs.prompts), len(graph.edges), dtype=torch.float64)
        clean, reference = torch.empty(2, len(patched), dtype=torch.float64)
        for n in track(range(len(patched)), "edges", progress):
            prompt = pairs.prompts[n]
            run, other = record(model, graph, prompt), record(model, graph, pairs.sources[n])
            check_sums(model, graph, run, other)
            clean[n], reference[n] = pairs.scores(n, torch.stack([run.logits, other.logits]), run.logits)
            points, score = _path(run, other, steps), partial(pairs.scores, n, clean=run.logits)
            gradients = torch.zeros(len(graph.receivers), *run.stream.shape[1:], dtype=wide(model), device=model.device)

            def add(some: slice, points=points, into=gradients, prompt=prompt, score=score) -> None:  # type: ignore[no-untyped-def]
                into.add_(_gradients(model, graph, prompt, points[some], score))

            budget.passes(steps, partial(budget.rows, prompt, 0), add)
            scores = (other.outputs - run.outputs).flatten(1) @ gradients.flatten(1).T / steps
            patched[n] = clean[n] + scores.cpu()[graph.exists].double()
        said = {"estimate": "edge attribution patching", "steps": steps}
        return pairs.effects(graph.edges, patched, clean, reference, said)


def _path(run: Run, source: Run, steps: int) -> Float[Tensor, "points tokens 1 d_model"]:
    """Input embeddings: the prompt's own, or points on the way to them."""
    here, there = run.outputs[0], source.outputs[0]
    at = (torch.arange(steps).to(here) + 0.5) / steps if steps > 1 else here.new_ones(1)
    return (there + at[:, None, None] * (here - there))[:, :, None]


def _gradients(
    model: Model,
    graph: Graph,
    prompt: Prefix,
    points: Float[Tensor, "points tokens 1 d_model"],
    score: Callable[[Tensor], Tensor],
) -> Float[Tensor, "receivers tokens d_model"]:
    """The metric's gradient at what each receiver is given, summed over the points: one forward and one backward."""
    middle: Site = "resid_pre" if graph.parallel else "resid_mid"
    sites: set[Site] = {"resid_pre", "q", "k", "v", middle, "mlp_out", "resid_post"}
    kept: dict[tuple[Site, int], Tensor] = {}

    def begin(x: Tensor) -> Tensor:
        return points.to(x).requires_grad_()

    def keep(site: Site, layer: int, x: Tensor) -> None:
        kept[site, layer] = x

    edits: Edits = keeping({"resid_pre": {0: begin}}, sorted(sites), graph.n_layers, keep)
    last = graph.n_layers - 1
    try:
        with torch.enable_grad():
            logits = model.forward(prompt.tokens.expand(len(points), -1), edits, inputs=prompt.prompt.inputs)
            scores = score(logits)
            seen: list[tuple[Site, int]] = [(site, at) for at in range(last + 1) for site in graph.given(at)]
            seen.append(("resid_post", last))
            found = _derivative(model, logits, scores, [kept[one] for one in seen])
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise UnsupportedModelError(f"{model.name} gives no gradients: it was made in inference mode") from error
    at = dict(zip(seen, found, strict=True))

    shape = (len(graph.receivers), *points.shape[1::2])
    gradients = torch.empty(shape, dtype=wide(model), device=model.device)
    for layer in range(graph.n_layers):
        for site, receivers in graph.given(layer).items():
            given = kept[middle if site == "mlp_out" else "resid_pre", layer]
            gradients[receivers] = _back(kept[site, layer], given, at[site, layer]).to(gradients)
    gradients[-1] = at["resid_post", last].sum(dim=0).squeeze(-2)
    return gradients


def _back(
    made: Float[Tensor, "points tokens units width"],
    given: Float[Tensor, "points tokens 1 d_model"],
    gradient: Float[Tensor, "points tokens units width"],
) -> Float[Tensor, "units tokens d_model"]:
    """From the gradient at what each unit is to that at what it was made of, summed over points: a backward pass for
    each unit alone, all of them at once, over the norm and the projection between.
    """
    if made.shape[2] == 1:  # an MLP: products of experts have no batched backward
        (found,) = torch.autograd.grad(made, given, gradient, retain_graph=True)
        return found.sum(dim=0).transpose(0, 1)
    alone = torch.eye(made.shape[2]).to(gradient)[:, None, None, :, None] * gradient  # [U, points, T, U, W]
    (found,) = torch.autograd.grad(made, given, alone, retain_graph=True, is_grads_batched=True)
    return found.sum(dim=1).squeeze(-2)


def _derivative(model: Model, logits: Tensor, scores: Tensor, by: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of all rows' metric. Raises ValueError for a metric, UnsupportedModelError for a model that records none."""
    recorded = all(x.requires_grad for x in by) and logits.requires_grad
    if recorded and not scores.requires_grad:
        raise ValueError("the metric records no gradient: compute it from the logits by differentiable operations")
    found = torch.autograd.grad(scores.sum(), by, retain_graph=True, allow_unused=True) if recorded else [None]
    if any(x is None for x in found):
        raise UnsupportedModelError(
            f"{model.name} gives no gradients: its layers record none (quantised ones, or under torch.no_grad)"
        )
    return tuple(found)  # type: ignore[arg-type]
