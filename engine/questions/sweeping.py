"""Every unit of a site patched alone, or group by group, on many prompts: what does each do to the answer?

    clean[n]          = metric(model(prompt n))
    patched[n, p, u]  = metric(model(prompt n), unit u := values, at position p)

The prefix of a prompt is computed once. A row patched at (layer l, position p) needs tokens from p on and layers from l
on only: of T x L rows over T tokens and L layers that is a quarter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.artifacts import can_begin, load_tensors, save_tensors
from engine.core.budget import Budget
from engine.core.checking import able
from engine.core.patches import Mode, Patch
from engine.distributed import ALONE, World, digest, identity, weights_of
from engine.progress import track
from engine.questions.asked import Asked, read_prompts
from engine.questions.effects import Effects
from engine.questions.groups import Groups, Units, read_groups
from engine.questions.metrics import Metric
from engine.questions.origins import Ablation, read_origin
from engine.questions.runs import Runs
from engine.questions.scoring import Answers, read_scoring
from engine.questions.where import Places, computed, read_where
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike, Site
from models.shapes import Bool, Float, Integer

TOGETHER = 1024  # tokens of the rows of several positions that share a call
MASKS = 4  # copies of a row's mask on the way to its edits


def sweep(
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
    groups: Groups = "units",
    positions: Places = -1,
    mode: Mode = "replace",
    memory: Integer | None = None,
    seed: Integer = 0,
    checkpoint: str | Path | None = None,
    world: World = ALONE,
    progress: bool = True,
) -> Effects:
    """The effect of patching each unit of a site alone, on every prompt: L x U rows a prompt, for a few forwards' work.

    prompts:   what is patched; an `Example`, or a plain (prompt, answer) pair, brings its target.
    values:    Float[L, U, W] for all prompts, or Float[N, L, U, W], one set a prompt; or an ablation: "zero"; "mean" of
               the prompts' own activations; "resample", those of another of the prompts, drawn by `seed`.
    source:    in place of values, a prompt for each prompt: its activations, at the same position, are patched in, and
               its own metric is the result's reference. Clean prompts with corrupted sources: noising; the other
               way round: denoising.
    site:      "z" (default) or another with values: `engine.Patch` says which there are.
    metric:    "probability" (of the target; default), "log_probability", "logit_difference" (target less other),
               "rank", "kl" (to the unpatched run), or a function of logits Float[rows, vocab].
    targets:   an answer a prompt: text as it follows the prompt, a token id, or a list of them.
    others:    likewise, the second answer of "logit_difference": log P(target) - log P(other).
    scored:    of an answer of several tokens: "answer" (default): all of it, each token after those before it, the
               prompt patched at the same positions; still one pass. "token_mean": log-probabilities a token, and
               probabilities' geometric mean. "first_token". "kl" and functions of your own see the first token's.
    groups:    "units" (default): heads, key/value heads, neurons, or layers where a site has one unit a layer;
               "layers": all units of each; or masks by name (`engine.groups` makes some): what is patched together.
    positions: one token (default the last); a list, of which each is patched by itself, or "all" tokens so; tokens by
               name, {"subject": [5, 4, ...]}, an index for each prompt; or "together": all tokens at once, each with
               its own value of the source.
    mode:      "replace" what is there, or "add" the values, then a tensor, to it, or "scale" it by them.
    memory:    bytes that rows may take; default an eighth of what is free. Fewer rows are tried when it does run out.
    checkpoint: a file, written after every prompt; a sweep that was stopped goes on from it, with the same results. It
               is removed at the end. A metric of one's own is known by its being one, not by what it does.
    world:     ranks that share out the prompts (`engine.distributed.joined`).

    Returns `Effects`. Raises ValueError, TypeError or IndexError before anything runs for what does not fit: a metric
    without targets, values of another shape, sources whose length differs where positions other than the last must
    match, a checkpoint of another sweep; after it, for a metric that is NaN, naming the prompts.

    Source: causal indirect effects, Function Vectors (arXiv 2310.15213), section 2.2; causal tracing, Locating and
    Editing Factual Associations (arXiv 2202.05262), section 2; How to use and interpret activation patching (arXiv
    2404.15255).

    >>> effects = engine.sweep(model, [Example("Q: hot\\nA:", " cold")], "zero", progress=False)
    >>> effects.patched.shape == (1, model.shape.n_layers, model.shape.n_heads)
    True
    """
    given, ready, targets = read_prompts(model, prompts, targets)
    where = read_where(ready, site, positions)
    origin = read_origin(ready, where, values, source, mode, seed)
    asked = Asked(ready, where, origin, read_scoring(model, given, metric, targets, others, scored))
    units = read_groups(model, groups, site)
    budget = Budget(model, memory)
    known = dict(asked.known, mode=mode, groups=digest(units.names, units.rows(0, len(units) if units.names else 1)))
    world.same(dict(known, **(identity(model) if world.size > 1 else {})))

    mine = world.share(len(ready))
    clean = torch.full((mine.stop - mine.start,), torch.nan, dtype=torch.float64)
    patched = clean.new_full((len(clean), len(where.spots[0]), len(units)), torch.nan)
    found = {"patched": patched, "clean": clean} | ({"reference": clean.clone()} if source is not None else {})
    state = {} if checkpoint is None else dict(dtype=str(model.dtype), weights=weights_of(model))
    kept = Checkpoint.of_rank(checkpoint, world, dict(known, **state, prompts=[mine.start, mine.stop]))
    done = kept.read(found)
    able(model, ready, layered=True, sites={site})
    for i in track(range(done, len(clean)), f"sweep of {len(units)} units", progress and world.rank == 0):
        new, source_run = origin.into(mine.start + i)
        patched[i], clean[i], unpatched = _scores(asked, mine.start + i, units, new, mode, budget)
        if source_run is not None:
            found["reference"][i] = Runs(asked.scoring, mine.start + i, source_run).scores(unpatched)[0]
        kept.write({name: scores[: i + 1] for name, scores in found.items()})

    found = {name: world.gather(scores, len(ready)) for name, scores in found.items()}
    effects = asked.effects(**found, units=units, metadata=known)
    kept.remove()
    return effects


@torch.no_grad()
def _scores(
    asked: Asked,
    n: int,
    units: Units,
    new: Float[Tensor, "spots tokens layers units width"],
    mode: Mode,
    budget: Budget,
) -> tuple[Float[Tensor, "spots masks"], float, Float[Tensor, " vocab"]]:
    """The metric of every unit at every spot, and of the unpatched run; and the unpatched run's logits."""
    prompt = asked.prompts[n]
    n_tokens = len(prompt.tokens)
    spots = asked.where.at(n, n_tokens)
    firsts = [min(spot) for spot in spots]
    calls = together(firsts, n_tokens, len(units))
    if len(calls) > 1:
        prompt = computed(prompt, max(firsts))
    scores = torch.empty(len(spots), len(units), dtype=torch.float64)
    clean: tuple[float, Tensor] | None = None
    for call in calls:
        lead = int(clean is None)  # the first row of the first call is the unpatched run
        found = torch.empty(lead + len(call) * len(units), dtype=torch.float64)

        def run(runs: Runs, some: slice, call: Sequence[int] = call, lead: int = lead, found: Tensor = found) -> None:
            nonlocal clean
            masks = _masks(units, call, lead, some)
            patches = [Patch(asked.where.site, mask, new[s][None], spots[s], mode) for s, mask in masks.items()]
            got, logits = runs.scores(None if clean is None else clean[1], patches)
            if clean is None:
                clean = got[0].item(), logits[0].clone()  # a view would keep those of all rows
            found[some] = got.double().cpu()

        runs = Runs(asked.scoring, n, prompt, min(firsts[s] for s in call))
        runs.in_passes(len(found), budget, run, row_bytes=MASKS * len(call) * units.nbytes)
        scores[call] = found[lead:].view(len(call), len(units))
    return scores, *clean  # type: ignore[misc]


def _masks(units: Units, call: Sequence[int], lead: int, some: slice) -> dict[int, Bool[Tensor, "rows layers units"]]:
    """Of some of the rows of a call, `lead` unpatched ones, then all units of every spot: by spot, what it patches."""
    found = {}
    for i, s in enumerate(call):
        start = lead + i * len(units)
        first, last = max(some.start, start), min(some.stop, start + len(units))
        if first < last:
            rows = units.rows(first - start, last - start)
            found[s] = rows.new_zeros(some.stop - some.start, *rows.shape[1:])
            found[s][first - some.start : last - some.start] = rows
    return found


def together(firsts: Sequence[int], n_tokens: int, n_units: int) -> list[list[int]]:
    """Spots, by their first tokens, whose rows share a call, from the end of the prompt to its start: rows of a call
    begin at the first token of any of them, and so few that a call costs the reading of the weights are better joined.

    >>> together([0, 1, 2, 3], 4, 100)
    [[3, 2, 1], [0]]
    """
    calls: list[list[int]] = []
    for s in sorted(range(len(firsts)), key=firsts.__getitem__, reverse=True):
        tokens = n_units * (n_tokens - firsts[s])
        if calls and (len(calls[-1]) + 1) * tokens <= TOGETHER:
            calls[-1].append(s)
        else:
            calls.append([s])
    return calls


@dataclass(frozen=True)
class Checkpoint:
    """The scores of the prompts that are done, in a file of one rank; `part` says of which. No path: none is kept."""

    path: Path | None
    part: dict[str, Any]

    @classmethod
    def of_rank(cls, path: str | Path | None, world: World, part: dict[str, Any]) -> Checkpoint:
        return cls(None if path is None else Path(f"{path}.{world.rank}" if world.size > 1 else path), part)

    def read(self, found: Mapping[str, Tensor]) -> int:
        """How many prompts are done, their scores put into the tensors. Raises ValueError for another sweep's."""
        if self.path is None or can_begin(self.path):
            return 0
        tensors, saved = load_tensors(self.path, ("clean",))
        expected = json.loads(json.dumps(self.part))
        if differing := sorted(key for key in expected.keys() | saved.keys() if saved.get(key) != expected.get(key)):
            raise ValueError(f"checkpoint {self.path} is of another sweep: {', '.join(differing)} differ")
        done = len(tensors["clean"])
        for name, scores in load_tensors(self.path, tuple(found))[0].items():
            found[name][:done] = scores
        return done

    def write(self, done: Mapping[str, Tensor]) -> None:
        if self.path is not None:
            save_tensors(self.path, done, self.part)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
