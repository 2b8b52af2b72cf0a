"""Runs in which each edge of the computational graph is the run's own, or the source's: circuits, and edges alone.

    what v is given = the stream there + sum over removed edges u -> v  (out_u of the source - out_u of this run)

A forward gives all heads of a layer the same, so that each run gets satellites beside it: rows of the same prompt that
are given, at a block's input and again at its MLP's, what a receiver would be. What they make of it (a head's query,
the MLP's output) goes to the run itself, whose residual stream stays the sum of its own senders. Receivers that are
given the same share a satellite, those from which no edge is removed need none, and every layer uses them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.core.budget import Budget
from engine.core.planning import MAX_TOKENS
from engine.core.prefix import Prefix
from engine.progress import track
from engine.questions.edges.graph import Graph
from engine.questions.edges.pairs import read_pair, read_pairs
from engine.questions.edges.satellites import Circuits
from engine.questions.edges.senders import Run, check_sums, heads_of, record
from engine.questions.effects import Effects
from engine.questions.metrics import Metric
from engine.questions.scoring import Answers
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike
from models.reading import read_tensor
from models.shapes import Bool, Float, Integer


@torch.no_grad()
def edge_runs(
    model: Model,
    prompt: PromptLike,
    source: PromptLike,
    keep: Bool[Tensor, "*rows senders receivers"] | np.ndarray,
    *,
    memory: Integer | None = None,
) -> Float[Tensor, "*rows vocab"]:
    """Logits of the last token with some edges kept and all others given what they carry in the source, at all tokens.

    source: a prompt of as many tokens.
    keep:   which edges are the run's own, in the order of `engine.Graph.of(model)`: Bool[R, senders, receivers], or of
            one row without the first axis. All: the prompt's own run; none: the source's. What is no edge of the graph
            does not count.
    memory: bytes that rows may take; default an eighth of what is free.

    Returns Float[R, vocab] in the model's dtype. Raises ValueError or TypeError before anything runs for what does not
    fit; UnsupportedModelError as `engine.attribute_edges`.

    Source: interchange ablation of circuits, Have Faith in Faithfulness (arXiv 2403.17806), section 2.

    >>> keep = engine.Graph.of(model).exists.clone()
    >>> keep[0] = False  # nobody is given the prompt's own embedding
    >>> engine.edge_runs(model, "Q: hot\\nA:", "Q: cold\\nA:", keep).shape == (model.shape.vocab_size,)
    True
    """
    prefix, other = read_pair(model, prompt, source)
    budget, graph = Budget(model, memory), Graph.of(model)
    keep = read_tensor(keep, "keep")
    shape = [len(graph.senders), len(graph.receivers)]
    if (
        not isinstance(keep, Tensor)
        or keep.dtype != torch.bool
        or list(keep.shape[-2:]) != shape
        or keep.ndim > 3
        or not len(keep)
    ):
        got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else f"{keep!r:.80}"
        raise ValueError(f"keep must be a bool mask [rows, {shape[0]} senders, {shape[1]} receivers], got {got}")
    run, there = record(model, graph, prefix), record(model, graph, other)
    check_sums(model, graph, run, there)
    rows = keep if keep.ndim == 3 else keep[None]
    logits = run.logits.new_empty(len(rows), len(run.logits))
    w_o: dict[int, Tensor] = {}

    def part(some: slice) -> None:
        logits[some] = _rows(model, graph, prefix, there, rows[some], w_o)

    budget.passes(len(rows), partial(_fit, budget, graph, prefix, rows), part)
    return logits if keep.ndim == 3 else logits[0]


def exact_edges(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    *,
    edges: Sequence[str],
    source: Sequence[PromptLike],
    metric: Metric | Callable[[Tensor], Tensor] = "probability",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    memory: Integer | None = None,
    progress: bool = True,
) -> Effects:
    """The effect of giving each of these edges alone what it carries in the source, at all tokens: two rows an edge.

    edges: names as `Graph.edges` has them, "a3.h1->a5.h2<q>". All else as `engine.attribute_edges`, which estimates
           what is computed here; "rank" and "kl" are no exceptions.

    Returns `Effects` whose groups are these edges, `reference` the sources' own metric. Raises as `attribute_edges`,
    and ValueError for names of no edges.

    Source: path patching (arXiv 2304.05969), section 3, of paths of one edge.

    >>> given = dict(source=["Q: cold\\nA:"], targets=[" cold"], progress=False)
    >>> effects = engine.exact_edges(model, ["Q: hot\\nA:"], edges=["input->m0", "m0->logits"], **given)
    >>> effects.groups
    ['input->m0', 'm0->logits']
    """
    with torch.inference_mode(False), torch.no_grad():
        pairs = read_pairs(model, prompts, source, metric, targets, others, scored)
        if isinstance(edges, str) or not isinstance(edges, Sequence) or not len(edges):
            raise ValueError(f"edges must be a list of names like 'input->m0', got {edges!r:.80}")
        budget, graph = Budget(model, memory), Graph.of(model)
        ends = [graph.edge(name) for name in edges]
        patched = torch.empty(len(pairs.prompts), len(edges), dtype=torch.float64)
        clean, reference = torch.empty(2, len(patched), dtype=torch.float64)
        w_o: dict[int, Tensor] = {}
        for n in track(range(len(patched)), "exact edges", progress):
            prompt = pairs.prompts[n]
            run, other = record(model, graph, prompt), record(model, graph, pairs.sources[n])
            check_sums(model, graph, run, other)
            clean[n], reference[n] = pairs.scores(n, torch.stack([run.logits, other.logits]), run.logits)

            def part(some: slice, n=n, prompt=prompt, run=run, other=other) -> None:  # type: ignore[no-untyped-def]
                logits = _rows(model, graph, prompt, other, _without(graph, ends[some]), w_o)
                patched[n, some] = pairs.scores(n, logits, run.logits).double().cpu()

            one = _without(graph, ends[:1])
            budget.passes(len(edges), partial(_fit, budget, graph, prompt, one), part)
        said = {"estimate": None, "edges": len(edges)}
        return pairs.effects(list(edges), patched, clean, reference, said)


def _without(graph: Graph, ends: Sequence[tuple[int, int]]) -> Bool[Tensor, "edges senders receivers"]:
    """All edges but one."""
    keep = graph.exists.repeat(len(ends), 1, 1)
    for row, (u, v) in enumerate(ends):
        keep[row, u, v] = False
    return keep


def _fit(budget: Budget, graph: Graph, prompt: Prefix, keep: Bool[Tensor, "rows senders receivers"]) -> int:
    """How many rows fit at once, each with its satellites and what its senders give."""
    circuits = Circuits.of(graph, keep)
    # A row of the budget has 16 numbers in flight for each of d_model.
    alone = budget.rows(prompt, 0) // (circuits.members + circuits.senders.shape[1] // 16)
    return min(alone, MAX_TOKENS // (circuits.members * len(prompt.tokens)))


def _rows(
    model: Model,
    graph: Graph,
    prompt: Prefix,
    source: Run,
    keep: Bool[Tensor, "rows senders receivers"],
    w_o: dict[int, Tensor],
) -> Float[Tensor, "rows vocab"]:
    """One forward. w_o: of single heads, by layer, as far as they were needed."""
    circuits = Circuits.of(graph, keep)
    w_o |= {layer: heads_of(model, layer) for layer in circuits.layers if layer not in w_o}
    tokens = prompt.tokens.expand(circuits.n_rows * circuits.members, -1)
    logits = model.forward(tokens, circuits.running(source, w_o).edits(), inputs=prompt.prompt.inputs)
    return logits[:: circuits.members]
