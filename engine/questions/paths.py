"""Path patching: what reaches receivers directly from a sender, all other heads held at what they were.

    pass one:  the sender puts out what it does in the source run, later heads (and MLPs) what they do in the prompt's;
               what the receivers are given then is kept.
    pass two:  the receivers are given that, and everything after them responds.

A token that is patched reaches later ones through attention only, which is held: what receivers are given differs at
the patched tokens alone, and both passes need the tokens from the first of them on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from engine.core.activations import capture, captured
from engine.core.budget import Budget
from engine.core.checking import able
from engine.core.patches import Patch
from engine.core.prefix import Prefix
from engine.core.reading import read_patches
from engine.progress import track
from engine.questions.asked import Asked, read_prompts
from engine.questions.effects import Effects
from engine.questions.metrics import Metric
from engine.questions.nodes import Node, read_node
from engine.questions.origins import read_origin
from engine.questions.runs import Runs
from engine.questions.scoring import Answers, read_scoring
from engine.questions.where import Places, Spot, computed, read_where
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike, Site
from models.reading import as_int
from models.shapes import Bool, Float, Integer

Freeze: TypeAlias = Literal["heads", "heads and MLPs"]


def paths(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    *,
    source: Sequence[PromptLike],
    senders: Literal["heads", "MLPs"] | Sequence[Any] = "heads",
    receivers: Any = "logits",
    freeze: Freeze = "heads",
    metric: Metric | Callable[[Tensor], Tensor] = "probability",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    positions: Places = -1,
    memory: Integer | None = None,
    progress: bool = True,
) -> Effects:
    """The effect of each sender on the answer along the direct paths to some receivers, on every prompt.

    source:    a prompt for each prompt: the senders' activations there are patched in; of the same length, unless only
               the last token is patched.
    senders:   "heads" (default) or "MLPs": each of them alone; or a list of nodes: "a3.h1" or (3, 1), head 1 of layer
               3; "m3", the MLP of layer 3.
    receivers: one or several, patched together: "a5.h2<q>" or (5, 2, "q"), the query of a head ("k", "v": of a
               key/value head, all of whose heads receive); "m7", the input of an MLP; or "logits" (default), alone.
    freeze:    "heads" (default): between senders and receivers MLPs respond, as in the paper; "heads and MLPs": the
               residual stream alone lies between them, which makes of each sender and receiver an edge.
    positions: tokens that senders are patched at, as `engine.sweep` has them. Default: the last.
    The other arguments are those of `engine.sweep`; answers of one token.

    Returns `Effects` of [prompts, layers, heads] or [prompts, layers], or by names for a list of senders. Senders that
    no receiver comes after have the effect 0. Rows: all senders of a prompt in a pass each (one for the logits).

    Raises ValueError before anything runs for a node that is none, receivers that come before a sender, or before all;
    UnsupportedModelError for a site that the model does not have.

    Source: path patching, Interpretability in the Wild (arXiv 2211.00593), section 3.1 and appendix B; Localizing Model
    Behavior with Path Patching (arXiv 2304.05969).

    >>> pairs = dict(source=["Q: big\\nA:"], progress=False)
    >>> engine.paths(model, [Example("Q: hot\\nA:", " ")], senders=["a1.h0", "m1"], **pairs).groups
    ['a1.h0', 'm1']
    """
    given, ready, targets = read_prompts(model, prompts, targets)
    if freeze not in get_args(Freeze):
        raise ValueError(f"freeze must be one of {get_args(Freeze)}, got {freeze!r}")
    sending, receiving = read_senders(model, senders), read_receivers(model, receivers)
    rows = Rows.of(model, sending, receiving, freeze, named=not isinstance(senders, str))
    where = read_where(ready, "z", positions)
    origin = read_origin(ready, where, None, source)
    asked = Asked(ready, where, origin, read_scoring(model, given, metric, targets, others, scored))
    if long := [n for n in range(len(ready)) if max(map(len, asked.scoring.answers(n))) > 1]:
        raise ValueError(
            f"paths lead to one token, the answer of prompt {long[0]} has several: give scored='first_token'"
        )
    budget = Budget(model, memory)
    patched = torch.empty(len(ready), len(where.spots[0]), len(sending), dtype=torch.float64)
    clean, reference = patched.new_empty(len(ready)), patched.new_empty(len(ready))
    able(model, ready, layered=True, sites={*rows.sent, *rows.held, *rows.reach})
    for n in track(range(len(ready)), f"paths of {len(sending)} senders", progress):
        spots, other = where.at(n, len(ready[n].tokens)), origin.sources[n]
        prompt = computed(ready[n], max(map(min, spots)))
        for p, theirs in enumerate(where.at(n, len(other.tokens))):
            runs = Runs(asked.scoring, n, prompt, min(spots[p]))
            scores, logits = _scores(runs, spots[p], _at(other, theirs, rows.sent), rows, budget)
            clean[n], patched[n, p] = scores[0], scores[1:]
        reference[n] = Runs(asked.scoring, n, other).scores(logits)[0]
    shape = (model.shape.n_layers, -1) if senders == "heads" else (-1,)
    patched = patched.unflatten(2, shape)
    known = {"receivers": [str(node) for node in receiving], "freeze": freeze, "prompts": len(ready)}
    return Effects(
        patched if where.names is not None else patched[:, 0],
        clean,
        reference,
        None if isinstance(senders, str) else [str(node) for node in sending],
        None if where.names is None else list(where.names),
        asked.scoring.metric,
        {**asked.known, **known},
        site="mlp_out" if senders == "MLPs" else "z",
        tokens=where.labels(ready),
    )


def read_senders(model: Model, senders: Any) -> list[Node]:
    """Raises ValueError for nodes that put nothing out."""
    shape = model.shape
    if isinstance(senders, str) and senders == "heads":
        return [Node("z", layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    if isinstance(senders, str) and senders == "MLPs":
        model.site("mlp_out")
        return [Node("mlp_out", layer) for layer in range(shape.n_layers)]
    found = [read_node(model, one) for one in ([senders] if isinstance(senders, str) else senders)]
    if odd := [node for node in found if node.site not in ("z", "mlp_out")]:
        raise ValueError(f'senders are heads and MLPs, "a3.h1" or "m3", got {str(odd[0])!r}')
    if not found:
        raise ValueError("no senders were given")
    return found


def read_receivers(model: Model, receivers: Any) -> list[Node]:
    """Raises ValueError for nodes that are given nothing by themselves."""
    # A tuple of three is a node, (layer, head, "q"), unless its first is one.
    node = isinstance(receivers, tuple) and len(receivers) == 3 and as_int(receivers[0]) is not None
    one = isinstance(receivers, str) or node
    found = [read_node(model, each) for each in ([receivers] if one else receivers)]
    if odd := [node for node in found if node.site == "z"]:
        raise ValueError(f'receivers are "a5.h2<q>" (<k>, <v>), "m7" or "logits", got {str(odd[0])!r}')
    if not found or (len(found) > 1 and any(node.site == "resid_post" for node in found)):
        raise ValueError("expected one receiver or several, or the logits alone: what reaches these passes by no other")
    return found


def comes_after(receiver: Node, sender: Node) -> bool:
    """Whether a receiver is given what a sender puts out: by a head, also the MLP of its layer (in blocks that run
    both in parallel it is not, and nothing of it reaches it).
    """
    if receiver.site == "resid_post":
        return True
    same = receiver.site == "mlp_out" and sender.site == "z" and receiver.layer == sender.layer
    return receiver.layer > sender.layer or same


@dataclass(frozen=True, eq=False)
class Rows:
    """What is patched in each row, by site; the first is unpatched, of the others each has one sender.

    sent:  the sender. held: what else puts out what it does in the prompt's run. reach: the receivers that come after
           the sender; empty: the logits.
    """

    sent: dict[Site, Bool[Tensor, "rows layers units"]]
    held: dict[Site, Bool[Tensor, "rows layers units"]]
    reach: dict[Site, Bool[Tensor, "rows layers units"]]

    @classmethod
    def of(cls, model: Model, senders: Sequence[Node], receivers: Sequence[Node], freeze: Freeze, named: bool) -> Rows:
        """Raises ValueError for receivers before their senders: if named, before any, else before all."""
        found = cls({}, {}, {})

        def mask(where: dict[Site, Tensor], site: Site) -> Tensor:
            size = model.site(site)
            return where.setdefault(site, torch.zeros(1 + len(senders), size.n_layers, size.units, dtype=torch.bool))

        alone = []
        for row, sender in enumerate(senders, start=1):
            mask(found.sent, sender.site)[row, sender.layer, sender.unit] = True
            mask(found.held, "z")[row, sender.layer + 1 :] = True
            if freeze == "heads and MLPs":
                mask(found.held, "mlp_out")[row, sender.layer + (sender.site == "mlp_out") :] = True
            after = [receiver for receiver in receivers if comes_after(receiver, sender)]
            for receiver in after:
                if receiver.site != "resid_post":
                    mask(found.reach, receiver.site)[row, receiver.layer, receiver.unit] = True
            alone += [] if after else [sender]
        if len(alone) == len(senders) or (named and alone):
            names = ", ".join(map(str, receivers))
            raise ValueError(f"receivers must come after their senders: {names} before {alone[0]}")
        return found


@torch.no_grad()
def _scores(
    runs: Runs, spot: Spot, new: dict[Site, Tensor], rows: Rows, budget: Budget
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " vocab"]]:
    """The metric of every row, and the logits of the unpatched one."""
    prompt, n_rows = runs.prompt, len(rows.held["z"])
    onwards = range(runs.first, len(prompt.tokens))
    old = _at(prompt, onwards, rows.held)
    scores = torch.empty(n_rows, dtype=torch.float64)
    clean: Tensor | None = None

    def run(runs: Runs, some: slice) -> None:
        nonlocal clean
        patches = [Patch(site, mask[some], new[site][None], spot) for site, mask in rows.sent.items()]
        patches += [Patch(site, mask[some], old[site][None], onwards) for site, mask in rows.held.items()]
        if rows.reach:
            given, sites = read_patches(prompt.model, patches), list(rows.reach)
            # An MLP's input shows in what it makes of it, before that is held.
            kept = captured(prompt.model, [(runs.prompt, list(spot))], sites, given, before={"mlp_out"})
            patches = [Patch(site, mask[some], kept[site][0], spot) for site, mask in rows.reach.items()]
        found, logits = runs.scores(clean, patches)
        clean = logits[0].clone() if clean is None else clean
        scores[some] = found.double().cpu()

    sizes = [prompt.model.site(site) for site in rows.reach]
    kept_bytes = sum(4 * len(spot) * size.n_layers * size.units * (4 * size.width + 8) for size in sizes)
    runs.in_passes(n_rows, budget, run, row_bytes=kept_bytes)
    return scores, clean  # type: ignore[return-value]


def _at(prompt: Prefix, tokens: Sequence[int], sites: Iterable[Site]) -> dict[Site, Tensor]:
    """What the unpatched prompt has at these tokens, [tokens, layers, units, width] by site."""
    found = capture(prompt.model, [prompt], tokens, sites=list(sites))  # type: ignore[list-item]
    return {site: x[0] for site, x in found.items()}
