"""Every head patched alone, or group by group, on many prompts: what does each do to the answer?

    clean[n]       = metric(model(prompt n))
    patched[n, u]  = metric(model(prompt n), z of unit u := values)

The prefix of a prompt is computed once; a row comes in at its first patched layer, which is half the work of running
each through all layers.
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
from engine.core.patches import Mode, Positions
from engine.distributed import ALONE, World, digest, identity
from engine.progress import track
from engine.questions.asked import Asked, read_prompts
from engine.questions.effects import Effects
from engine.questions.groups import Groups, read_groups
from engine.questions.metrics import Metric
from engine.questions.origins import Ablation, read_origin
from engine.questions.runs import Runs
from engine.questions.scoring import Answers, read_scoring
from engine.questions.where import read_where
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike
from models.shapes import Bool, Float, Integer


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
    groups: Groups = "heads",
    positions: Positions = -1,
    mode: Mode = "replace",
    memory: Integer | None = None,
    seed: Integer = 0,
    checkpoint: str | Path | None = None,
    world: World = ALONE,
    progress: bool = True,
) -> Effects:
    """The effect of patching each head alone, on every prompt: L x H rows a prompt, for a few forwards' work.

    prompts:   what is patched; an `Example`, or a plain (prompt, answer) pair, brings its target.
    values:    Float[L, H, D] for all prompts, or Float[N, L, H, D], one set a prompt; or an ablation: "zero"; "mean" of
               the prompts' own activations; "resample", those of another of the prompts, drawn by `seed`.
    source:    in place of values, a prompt for each prompt: its activations, at the same position, are patched in, and
               its own metric is the result's reference. Clean prompts with corrupted sources: noising; the other
               way round: denoising.
    metric:    "probability" (of the target; default), "log_probability", "logit_difference" (target less other),
               "rank", "kl" (to the unpatched run), or a function of logits Float[rows, vocab].
    targets:   an answer a prompt: text as it follows the prompt, a token id, or a list of them.
    others:    likewise, the second answer of "logit_difference": log P(target) - log P(other).
    scored:    of an answer of several tokens: "answer" (default): all of it, each token after those before it, the
               prompt patched at the same positions; still one pass. "token_mean": log-probabilities a token, and
               probabilities' geometric mean. "first_token". "kl" and functions of your own see the first token's.
    groups:    "heads" (default), "layers", or masks by name (`engine.groups` makes some): what is patched together.
    positions: one, or a list, of which each is patched by itself. Default: the last token.
    mode:      "replace" the heads' output, or "add" the values, then a tensor, to it, or "scale" it by them.
    memory:    bytes that rows may take; default an eighth of what is free. Fewer rows are tried when it does run out.
    checkpoint: a file, written after every prompt; a sweep that was stopped goes on from it, with the same results. It
               is removed at the end. A metric of one's own is known by its being one, not by what it does.
    world:     ranks that share out the prompts (`engine.distributed.joined`).

    Returns `Effects`. Raises ValueError, TypeError or IndexError before anything runs for what does not fit: a metric
    without targets, values of another shape, sources whose length differs where positions other than the last must
    match, a checkpoint of another sweep; after it, for a metric that is NaN, naming the prompts.

    Source: causal indirect effects, Function Vectors (arXiv 2310.15213), section 2.2; activation patching, How to use
    and interpret activation patching (arXiv 2404.15255).

    >>> effects = engine.sweep(model, [Example("Q: hot\\nA:", " cold")], "zero", progress=False)
    >>> effects.patched.shape == (1, model.shape.n_layers, model.shape.n_heads)
    True
    """
    given, ready, targets = read_prompts(model, prompts, targets)
    where = read_where(ready, positions)
    origin = read_origin(ready, where, values, source, mode, seed)
    asked = Asked(ready, where, origin, read_scoring(model, given, metric, targets, others, scored))
    masks, names = read_groups(model, groups)
    budget = Budget(model, memory)
    known = dict(asked.known, mode=mode, groups=digest(list(names or ()), masks))
    world.same(dict(known, **(identity(model) if world.size > 1 else {})))

    mine = world.share(len(ready))
    clean = torch.full((mine.stop - mine.start,), torch.nan, dtype=torch.float64)
    patched = clean.new_full((len(clean), len(where.at), len(masks)), torch.nan)
    found = {"patched": patched, "clean": clean} | ({"reference": clean.clone()} if source is not None else {})
    kept = Checkpoint.of_rank(checkpoint, world, dict(known, prompts=[mine.start, mine.stop]))
    done = kept.read(found)
    able(model, ready, layered=True)
    for i in track(range(done, len(clean)), f"sweep of {len(masks)} units", progress and world.rank == 0):
        n = mine.start + i
        prompt, (new, source_run) = ready[n], origin.into(n)
        if len(where.at) > 1:
            prompt = where.computed(prompt)
        for p, position in enumerate(where.at):
            runs = Runs(asked.scoring, n, prompt, position)
            scores, unpatched = _scores(runs, masks, budget, values=new[p], mode=mode)
            clean[i], patched[i, p] = scores[0], scores[1:]
        if source_run is not None:
            found["reference"][i] = Runs(asked.scoring, n, source_run).scores(unpatched)[0]
        kept.write({name: scores[: i + 1] for name, scores in found.items()})

    found = {name: world.gather(scores, len(ready)) for name, scores in found.items()}
    named = None if names is None else dict(zip(names, masks, strict=True))
    effects = asked.effects(**found, groups=named, metadata=known)
    kept.remove()
    return effects


@torch.no_grad()
def _scores(
    runs: Runs, masks: Bool[Tensor, "units layers heads"], budget: Budget, **patched: Any
) -> tuple[Float[Tensor, " unpatched_and_units"], Float[Tensor, " vocab"]]:
    """The metric of the unpatched run and, after it, of every unit; and the unpatched run's logits."""
    rows = torch.cat([torch.zeros_like(masks[:1]), masks])
    scores = torch.empty(len(rows), dtype=torch.float64)
    clean: Tensor | None = None

    def run(runs: Runs, some: slice) -> None:
        nonlocal clean
        found, logits = runs.scores(clean if some.start else None, heads=rows[some], **patched)
        if not some.start:
            clean = logits[0].clone()  # a view would keep those of all rows
        scores[some] = found.double().cpu()

    runs.in_passes(len(rows), budget, run)
    return scores, clean  # type: ignore[return-value]


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
