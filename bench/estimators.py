"""How many model tokens each gradient estimate needs until its heads are as good as those of the 300-step search.

    reference   validation loss of 300 steps of REINFORCE, 32 rollouts on one example each
    goal        the first step whose choice of heads comes within 0.05 nats of it

A step's choice is made as the search makes its last one: the best of ten candidates on fifty validation examples. That,
and its time, is not counted. Tokens are those that pass the embedding; what the backward pass goes through again is
counted once more. Prefixes are computed by every search anew, and counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Generator, Tensor

import engine
from engine import tasks
from engine.experiments.spending import Spent
from engine.methods import mtv
from engine.methods.search import above
from engine.tasks.scoring import first_token_losses
from models import Model

NAMES = ("antonyms", "past_tense")


class Way(NamedTuple):
    """A search: its options, every how many steps its heads are looked at, and the step at which it is given up."""

    options: dict[str, Any]
    every: int
    steps: int

    def candidates(self, p: Tensor, random: Generator) -> Tensor:
        """As the search's end would choose among."""
        count = mtv.PRESETS["reference"].candidates
        if self.options.get("candidates") == "thresholds":
            return above(p, count)
        return torch.bernoulli(p.expand(count, -1, -1), generator=random).bool()


WAYS = {
    "reinforce": Way(dict(estimator="reinforce"), 25, 300),
    "leave_one_out": Way(dict(estimator="leave_one_out"), 25, 300),
    "leave_one_out, 8 x 4 prompts": Way(dict(estimator="leave_one_out", rollouts=8, prompts_per_step=4), 25, 300),
    "straight_through, 4 prompts": Way(dict(estimator="straight_through", prompts_per_step=4), 10, 300),
    "straight_through, 4 prompts, thresholds": Way(
        dict(estimator="straight_through", prompts_per_step=4, candidates="thresholds"), 5, 300
    ),
    "straight_through, 4 prompts, thresholds, lr 0.2": Way(
        dict(estimator="straight_through", prompts_per_step=4, candidates="thresholds", lr=0.2), 5, 300
    ),
    "relaxed, 4 prompts": Way(dict(estimator="relaxed", prompts_per_step=4), 10, 300),
    "relaxed, 4 prompts, thresholds, lr 0.2": Way(
        dict(estimator="relaxed", prompts_per_step=4, candidates="thresholds", lr=0.2), 5, 300
    ),
}
REFERENCE = "reinforce"
WITHIN = 0.05  # nats


class EnoughError(Exception):
    """The search has what it was for."""


def curve(
    model: Model,
    examples: Sequence[tasks.Example],
    means: Tensor,
    validation: Sequence[tasks.Example],
    way: Way,
    seed: int,
    goal: float | None = None,
) -> list[dict[str, float]]:
    """What was spent and reached every few steps; up to the first that reaches the goal, where one is given."""
    options, every, steps = way.options, way.every, way.steps
    prefixes = engine.PrefixPool(model, [example.prompt for example in validation])
    held_out = [prefixes[i] for i in range(len(prefixes))]
    targets = [tasks.first_token(model, example) for example in validation]
    found: list[dict[str, float]] = []
    rollouts = seconds = 0.0
    started = time.perf_counter()
    random = Generator().manual_seed(seed)

    def look(step: mtv.Step) -> None:
        nonlocal started, seconds, rollouts
        spent.counting = False
        seconds += time.perf_counter() - started
        rollouts += options.get("rollouts", 1 if spent.backward else 32) * options.get("prompts_per_step", 1)
        if step.step % every == 0 or step.step == steps:
            drawn = way.candidates(step.probabilities, random)
            losses = first_token_losses(model, held_out, targets, heads=drawn, values=means)
            point = dict(step=step.step, tokens=spent.tokens, forward=spent.forward, rollouts=rollouts, seconds=seconds)
            found.append(point | {"loss": losses.mean(dim=0).min().item()})
            if goal is not None and found[-1]["loss"] <= goal:
                raise EnoughError
        spent.counting = True
        started = time.perf_counter()

    with Spent().of(model) as spent, suppress(EnoughError):
        mtv.extract(model, examples, means, steps=steps, seed=seed, on_step=look, progress=False, **options)
    return found


def measure(
    model: Model,
    names: Sequence[str] = NAMES,
    seeds: Sequence[int] = range(5),
    ways: Sequence[str] = tuple(WAYS),
    within: float = WITHIN,
) -> dict[str, Any]:
    """For each task and seed the reference's loss and spending, and each way's at its goal (None: not reached)."""
    runs = []
    for name in names:
        task = tasks.load(name)
        for seed in seeds:
            split = task.split(seed)
            examples = [task.example(query) for query in split.train[:100]]
            validation = [task.example(query) for query in split.validation[:50]]
            prompts = [example.prompt for example in task.few_shot(split.train, 8, 100, seed)]
            given = (model, examples, engine.mean_activations(model, prompts, progress=False), validation)
            whole = curve(*given, WAYS[REFERENCE], seed)
            goal = whole[-1]["loss"] + within
            run: dict[str, Any] = {"task": name, "seed": seed, "reference": whole[-1], "ways": {}}
            for way in ways:
                seen = whole if way == REFERENCE else curve(*given, WAYS[way], seed, goal)
                run["ways"][way] = next((point for point in seen if point["loss"] <= goal), None)
            runs.append(run)
    return {"steps": WAYS[REFERENCE].steps, "within": within, "runs": runs}


def table(result: Mapping[str, Any]) -> Table:
    """Medians over the seeds of a task, the range in brackets; one that never got there is infinitely long."""
    shown = Table(title=f"within {result['within']} nats of {result['steps']} steps of REINFORCE")
    for column in ("task", "estimate", "reached", "steps", "rollouts", "model tokens", "seconds", "reference tokens /"):
        shown.add_column(column, justify="left" if column in ("task", "estimate") else "right")
    for task in dict.fromkeys(run["task"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["task"] == task]
        for way in runs[0]["ways"]:
            points = [run["ways"][way] for run in runs]
            reached = sum(point is not None for point in points)
            cells = [
                _spread([point[key] if point else float("inf") for point in points])
                for key in ("step", "rollouts", "tokens", "seconds")
            ]
            ratio = [
                run["reference"]["tokens"] / point["tokens"] if point else 0.0
                for run, point in zip(runs, points, strict=True)
            ]
            shown.add_row(task, way, f"{reached} of {len(points)}", *cells, _spread(ratio))
    return shown


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"
