"""Which tokens must the answer's token see? Attention to groups of tokens is cut, in windows of layers.

patched[n, g, l] = metric(model(prompt n), patched tokens not seeing those of group g in layers about l)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.core.budget import Budget
from engine.core.checking import able
from engine.core.patches import Knockout, Positions
from engine.core.prefix import Prefix, patched_positions
from engine.core.reading import read_patches, read_positions
from engine.progress import track
from engine.questions.asked import read_prompts
from engine.questions.effects import Effects
from engine.questions.metrics import Metric
from engine.questions.runs import Runs
from engine.questions.scoring import Answers, read_scoring
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike
from models.reading import as_int, read_int, read_list
from models.shapes import Bool, Integer

MASKS = 8  # bytes that a head of a row takes on its way to its edit


def sweep_knockout(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    keys: Mapping[str, Any],
    *,
    window: Integer = 5,
    positions: Positions = -1,
    metric: Metric | Callable[[Tensor], Tensor] = "probability",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    memory: Integer | None = None,
    progress: bool = True,
) -> Effects:
    """The effect of a token not seeing groups of other tokens, in all heads of a window of layers: a curve a group.

    keys:      by name, for each prompt the tokens that are not seen: an index, or a list of them, negative ones counted
               from the end; or "image": the tokens of its images.
    window:    layers that are cut about each layer l, l - window // 2 the first of them; fewer at either end (default
               5; 1: one layer at a time).
    positions: token or tokens that do not see, all of them at once. Default: the last of the prompt, which is where its
               answer begins; later tokens of an answer see everything.
    The other arguments are those of `engine.sweep`.

    Returns `Effects` of [prompts, groups, layers], the groups being its positions. One pass a prompt: the prefix is
    shared, each window of each group is a row, which comes in at the window's first layer.

    Raises ValueError, TypeError or IndexError before anything runs: no keys, keys that come after the token that would
    not see them or are all that it sees, prompts without images; UnsupportedModelError for a model whose attention is
    not seen.

    Source: attention knockout, Dissecting Recall of Factual Associations (arXiv 2304.14767), section 4, there with
    windows of 9 (GPT-2) and 5 layers (GPT-J); of image tokens, Cross-modal Information Flow in Multimodal Large
    Language Models (arXiv 2411.18620).

    >>> cut = engine.sweep_knockout(model, [Example("Q: hot\\nA:", " cold")], {"hot": [2]}, progress=False)
    >>> cut.patched.shape == (1, 1, model.shape.n_layers), cut.positions
    (True, ['hot'])
    """
    given, ready, targets = read_prompts(model, prompts, targets)
    scoring, at = read_scoring(model, given, metric, targets, others, scored), read_positions(positions)
    scoring.check(ready)
    layers, groups = windows(model, read_int(window, "window")), read_keys(ready, keys)
    heads = torch.cat([torch.zeros_like(layers[:1]), layers.repeat(len(groups), 1, 1)])  # first: the unpatched run
    cuts = [_cuts(prompt, heads, [own[n] for own in groups.values()], at) for n, prompt in enumerate(ready)]
    budget = Budget(model, memory)
    patched = torch.empty(len(ready), len(groups), len(layers), dtype=torch.float64)
    clean = patched.new_empty(len(ready))
    able(model, ready, layered=True, sites={"scores"})
    for n in track(range(len(ready)), f"knockout of {len(groups)} groups", progress):
        runs = Runs(scoring, n, ready[n], min(p % len(ready[n].tokens) for p in at))
        scores = _scores(runs, cuts[n], budget)
        clean[n], patched[n] = scores[0], scores[1:].view(len(groups), len(layers))
    known = {"model": model.name, "window": int(window), "not seeing": list(at), "prompts": len(ready)}
    return Effects(patched, clean, None, None, list(groups), scoring.metric, known, site="scores")


@torch.no_grad()
def _scores(runs: Runs, cut: Knockout, budget: Budget) -> Tensor:
    heads: Any = cut.heads
    scores = torch.empty(len(heads), dtype=torch.float64)
    clean: Tensor | None = None

    def run(runs: Runs, some: slice) -> None:
        nonlocal clean
        found, logits = runs.scores(clean, [Knockout(heads[some], cut.keys[some], cut.positions)])
        clean = logits[0].clone() if clean is None else clean
        scores[some] = found.double().cpu()

    runs.in_passes(len(heads), budget, run, row_bytes=MASKS * heads[0].numel())
    return scores


def windows(model: Model, width: int) -> Bool[Tensor, "windows layers heads"]:
    """All heads of the layers about each layer."""
    n_layers = model.shape.n_layers
    centre, layer = torch.arange(n_layers)[:, None], torch.arange(n_layers)
    first = centre - width // 2
    return ((layer >= first) & (layer < first + width))[:, :, None].expand(-1, -1, model.shape.n_heads)


def _cuts(prompt: Prefix, heads: Tensor, groups: Sequence[list[int]], at: Sequence[int]) -> Knockout:
    """Rows of a prompt, their tokens counted from its start. Raises before anything runs for what cannot be cut."""
    n_tokens = len(prompt.tokens)
    if outside := [token for own in (*groups, at) for token in own if not -n_tokens <= token < n_tokens]:
        raise IndexError(f"token {outside[0]} lies outside the prompt, which has {n_tokens} tokens")
    keys = [[key % n_tokens for key in own] for own in groups]
    positions = [position % n_tokens for position in at]
    patched_positions(
        read_patches(prompt.model, Knockout(heads[1:2].expand(len(keys), -1, -1), keys, positions)), prompt
    )
    each = (len(heads) - 1) // len(keys)
    return Knockout(heads, [keys[0], *(own for own in keys for _ in range(each))], positions)


def read_keys(prompts: Sequence[Prefix], keys: Any) -> dict[str, list[list[int]]]:
    """Of each group, the tokens of every prompt."""
    if not isinstance(keys, Mapping) or not keys:
        raise ValueError(f"keys must be tokens by name, {{'subject': [[4, 5], ...]}}, got {keys!r:.80}")
    found: dict[str, list[list[int]]] = {}
    for name, given in keys.items():
        if isinstance(given, str):
            found[name] = _images(prompts, name, given)
            continue
        rows = [[token] if as_int(token) is not None else read_list(token) for token in read_list(given)]
        if len(rows) != len(prompts):
            raise ValueError(f"keys {name!r} must be given for each of {len(prompts)} prompts, got {len(rows)}")
        if odd := [row for row in rows if not row or None in map(as_int, row)]:
            raise TypeError(f"keys {name!r} must be tokens of each prompt, one at least, got {odd[0]!r:.80}")
        found[name] = [[int(token) for token in row] for row in rows]
    return found


def _images(prompts: Sequence[Prefix], name: str, given: str) -> list[list[int]]:
    if given != "image":
        raise ValueError(f"keys {name!r} must be tokens of each prompt, or 'image', got {given!r}")
    if without := [n for n, prompt in enumerate(prompts) if prompt.prompt.image_tokens is None]:
        raise ValueError(f"keys {name!r} are of images, and prompt {without[0]} has none")
    return [prompt.prompt.image_tokens.nonzero().flatten().tolist() for prompt in prompts]  # type: ignore[union-attr]
