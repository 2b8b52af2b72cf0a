"""The options of a search for heads, read: which of them go together, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from engine.distributed import ALONE, World
from engine.methods.estimators import BY_GATES, ESTIMATORS
from engine.tasks.scoring import Scored
from models.reading import read_int, read_seed
from models.shapes import Integer

# What the end of a search chooses among: draws from theta, or the heads above each of several probabilities.
Candidates: TypeAlias = Literal["draws", "thresholds"]


@dataclass(frozen=True)
class Preset:
    """Where the paper and its reference code differ.

    steps:      default number of steps.
    init:       of theta; None: standard normal.
    clamp:      probabilities stay in [clamp, 1 - clamp].
    normalise:  advantage (L - mean) / (std + 1e-3), log-probabilities summed over rollouts; else A = L, averaged.
    in_order:   examples taken one after the other; else drawn with replacement.
    candidates: choices of heads, of which the best on the validation examples is kept.
    patched:    tokens of an answer that are patched when it is generated (`engine.generate`).
    stops:      where an answer is cut off.
    """

    steps: int
    init: float | None
    clamp: float
    normalise: bool
    in_order: bool
    candidates: int
    patched: Literal["prompt", "all"] = "all"
    stops: tuple[str, ...] = ("\n", ".")


PRESETS = {
    "paper": Preset(steps=100, init=None, clamp=0.0, normalise=False, in_order=True, candidates=1),
    "reference": Preset(steps=600, init=-1.0, clamp=1e-3, normalise=True, in_order=False, candidates=10),
}


@dataclass(frozen=True)
class Options:
    """As `engine.mtv.extract` describes them; none is left open but `at_once`, which a checkpoint may know."""

    preset: str
    steps: int
    estimator: str
    rollouts: int
    prompts_per_step: int
    loss: str
    lr: float
    seed: int
    threshold: float
    candidates: Candidates
    at_once: int | None
    checkpoint_every: int

    @property
    def constants(self) -> Preset:
        return PRESETS[self.preset]

    @property
    def by_gates(self) -> bool:
        return self.estimator in BY_GATES

    @property
    def shared(self) -> tuple[str, int]:
        """What ranks share out, and how many of it a step has."""
        return ("prompt", self.prompts_per_step) if self.by_gates else ("rollout", self.rollouts)

    def share(self, world: World) -> int:
        """The most of it that one rank has."""
        return -(-self.shared[1] // world.size)

    @property
    def settings(self) -> dict[str, Any]:
        """Those that make another search; in results, and in checkpoints."""
        names = ("preset", "estimator", "rollouts", "prompts_per_step", "loss", "lr", "seed")
        return {name: getattr(self, name) for name in names}


def read_options(
    *,
    preset: str = "reference",
    steps: Integer | None = None,
    estimator: str = "reinforce",
    rollouts: Integer | None = None,
    prompts_per_step: Integer = 1,
    loss: str = "first_token",
    lr: float | np.floating[Any] = 0.1,
    seed: Integer = 0,
    threshold: float | np.floating[Any] = 0.0,
    candidates: Candidates = "draws",
    at_once: Integer | None = None,
    checkpoint_every: Integer = 10,
    world: World = ALONE,
) -> Options:
    """Raises ValueError or TypeError for what cannot be run, or not by so many ranks."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {list(ESTIMATORS)}, got {estimator!r}")
    default, least = (1, 1) if estimator in BY_GATES else (32, 2)
    steps = PRESETS[preset].steps if steps is None else read_int(steps, "steps", None)
    rollouts = default if rollouts is None else read_int(rollouts, "rollouts", None)
    prompts_per_step = read_int(prompts_per_step, "prompts_per_step", None)
    at_once = None if at_once is None else read_int(at_once, "at_once", None)
    checkpoint_every = read_int(checkpoint_every, "checkpoint_every", None)
    if steps < 1 or rollouts < least or not isinstance(lr, Real) or not 0 < lr < math.inf:
        raise ValueError(
            f"expected steps >= 1, rollouts >= {least}, lr > 0, got steps={steps}, rollouts={rollouts}, lr={lr!r}"
        )
    if estimator == "relaxed" and rollouts > 1:
        raise ValueError(f"estimator 'relaxed' draws no masks, all rollouts would be one: got rollouts={rollouts}")
    if prompts_per_step < 1:
        raise ValueError(f"expected prompts_per_step >= 1, got prompts_per_step={prompts_per_step}")
    if checkpoint_every < 1:
        raise ValueError(f"expected checkpoint_every >= 1, got checkpoint_every={checkpoint_every}")
    if loss not in get_args(Scored):
        raise ValueError(f"loss must be one of {list(get_args(Scored))}, got {loss!r}")
    if not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise ValueError(f"threshold must be a probability from 0 to below 1, got {threshold!r}")
    if candidates not in get_args(Candidates):
        raise ValueError(f"candidates must be one of {list(get_args(Candidates))}, got {candidates!r}")
    options = Options(
        preset, steps, estimator, rollouts, prompts_per_step, loss, float(lr), read_seed(seed), float(threshold),
        candidates, at_once, checkpoint_every,
    )  # fmt: skip
    what, shared = options.shared
    if shared < world.size:
        name = "prompts_per_step" if options.by_gates else "rollouts"
        raise ValueError(f"expected at least one {what} for each of {world.size} ranks, got {name}={shared}")
    if at_once is not None and not 1 <= at_once <= options.share(world):
        raise ValueError(
            f"expected at_once from 1 to {options.share(world)}, {shared} {what}s shared by {world.size} "
            f"rank(s), got at_once={at_once}"
        )
    return options
