"""What a search keeps: theta, its draws and updates, its checkpoint; and the steps that are left of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from engine.artifacts import can_begin, load_tensors, save_tensors
from engine.distributed import ALONE, World
from engine.methods.estimators import Estimator, leave_one_out, standardised
from engine.methods.options import Candidates, Preset
from engine.progress import track
from models.shapes import Bool, Float


class Descent:
    """theta, and all that must be kept to go on with it: Adam's moments, the random state, the losses so far.

    decay: AdamW's weight decay.
    """

    names: tuple[str, ...] = ("theta", "exp_avg", "exp_avg_sq", "random", "losses")

    def __init__(self, theta: Float[Tensor, "..."], lr: float, random: Generator, decay: float = 0.0):
        self.random = random
        self.theta = theta.requires_grad_()
        self.adam = torch.optim.AdamW([self.theta], lr=lr, weight_decay=decay)  # without decay, it is Adam
        self.losses: list[float] = []
        self.kept = 0  # steps in the checkpoint

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def done(self) -> bool:
        """Whether there is no use in going on."""
        return False

    def draw_examples(self, n: int, count: int) -> list[int]:
        return torch.randint(n, (count,), generator=self.random).tolist()

    def descend(self, objective: Tensor, losses: Tensor) -> None:
        (self.theta.grad,) = torch.autograd.grad(objective, self.theta)  # and none of the weights
        self.adam.step()
        self.losses.append(losses.mean().item())

    def tensors(self) -> dict[str, Tensor]:
        """By `names`."""
        state = self.adam.state[self.theta]
        return {
            "theta": self.theta,
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
            "random": self.random.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def save(self, path: str | Path, identity: dict[str, Any]) -> None:
        save_tensors(path, self.tensors(), identity)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what was saved."""
        with torch.no_grad():
            self.theta.copy_(tensors["theta"])
        self.losses = tensors["losses"].tolist()
        self.kept = self.step
        step = torch.tensor(float(self.step))
        self.adam.state[self.theta] = {
            "step": step,
            "exp_avg": tensors["exp_avg"],
            "exp_avg_sq": tensors["exp_avg_sq"],
        }
        self.random.set_state(tensors["random"])


class Search(Descent):
    """Of heads: sigmoid(theta) is the probability of each to be patched."""

    def __init__(
        self, preset: Preset, shape: tuple[int, int], lr: float, seed: int, estimator: Estimator = "reinforce"
    ):
        self.preset = preset
        self.estimator = estimator
        random = Generator().manual_seed(seed)
        theta = torch.randn(shape, generator=random) if preset.init is None else torch.full(shape, preset.init)
        super().__init__(theta, lr, random)

    def _p(self) -> Float[Tensor, "layers heads"]:
        return self.theta.sigmoid().clamp(self.preset.clamp, 1 - self.preset.clamp)

    def probabilities(self) -> Float[Tensor, "layers heads"]:
        return self._p().detach()

    def draw_example(self, n: int) -> int:
        return self.draw_examples(n, 1)[0]

    def draw_examples(self, n: int, count: int) -> list[int]:
        if self.preset.in_order:
            return [(self.step * count + i) % n for i in range(count)]
        return super().draw_examples(n, count)

    def draw(self, rollouts: int) -> Bool[Tensor, "rollouts layers heads"]:
        return self._draw(self.probabilities(), rollouts)

    def draw_candidates(
        self, threshold: float, candidates: Candidates = "draws"
    ) -> Bool[Tensor, "candidates layers heads"]:
        """From sigmoid(theta) itself, nothing clamped; heads of a probability up to `threshold` are left out."""
        p = self.theta.detach().sigmoid()
        p = p.masked_fill(p <= threshold, 0)
        if candidates == "thresholds":
            return above(p, self.preset.candidates)
        return self._draw(p, self.preset.candidates)

    def _draw(self, p: Float[Tensor, "layers heads"], times: int) -> Bool[Tensor, "times layers heads"]:
        return torch.bernoulli(p.expand(times, -1, -1), generator=self.random).bool()

    def draw_gates(self, prompts: int, rollouts: int) -> Float[Tensor, "prompts rollouts layers heads"]:
        """Masks of each prompt's own; relaxed: the probabilities."""
        p = self.probabilities().expand(prompts, rollouts, -1, -1)
        return p.clone() if self.estimator == "relaxed" else torch.bernoulli(p, generator=self.random)

    def update(self, masks: Bool[Tensor, "rollouts layers heads"], losses: Float[Tensor, " rollouts"]) -> None:
        """One step by rollouts: heads of those with a high loss become less likely."""
        log_p = -torch.nn.functional.binary_cross_entropy(
            self._p().expand(masks.shape), masks.float(), reduction="none"
        ).sum(dim=(1, 2))
        if self.estimator == "leave_one_out":
            policy_loss = (log_p * leave_one_out(losses)).mean()
        elif self.preset.normalise:
            policy_loss = standardised(log_p, losses)
        else:
            policy_loss = (log_p * losses).mean()
        self.descend(policy_loss, losses)

    def follow(self, gradient: Float[Tensor, "layers heads"], losses: Float[Tensor, "prompts rollouts"]) -> None:
        """One step by gates: what the loss gains or loses with each is passed on to its probability."""
        self.descend((self._p() * gradient).sum(), losses)


def above(p: Float[Tensor, "layers heads"], count: int) -> Bool[Tensor, "{count} layers heads"]:
    """Heads likelier than each of so many levels, evenly between 0 and 1."""
    levels = torch.arange(1, count + 1) / (count + 1)
    return p > levels[:, None, None]


def run(
    search: Descent,
    steps: int,
    step: Callable[[], None],
    *,
    label: str,
    show: bool,
    checkpoint: str | Path | None,
    every: int,
    identity: dict[str, Any],
    world: World = ALONE,
    after: Callable[[float], None] | None = None,
) -> None:
    """The steps that are left of so many; every so many of them, and after the last, the checkpoint is written.

    after: is told the seconds of each step.
    """
    for _ in track(range(search.step, steps), label, show):
        if search.done:
            break
        started = time.perf_counter()
        step()
        if checkpoint is not None and (search.step % every == 0 or search.step == steps or search.done):
            world.from_first(lambda: search.save(checkpoint, identity))
            search.kept = search.step
        if after:
            after(time.perf_counter() - started)


def resume(
    search: Descent, steps: int, checkpoint: str | Path | None, identity: dict[str, Any], world: World = ALONE
) -> int | None:
    """The search goes on from the checkpoint, if there is one: how many rollouts ran at once then.

    Raises ValueError for a checkpoint of another search, or of more steps; OSError if none can be written.
    """
    if checkpoint is None:
        return None
    saved = world.from_first(lambda: read_checkpoint(checkpoint, identity, search.names))
    if saved is None:
        return None
    search.load(saved[0])
    if search.step > steps:
        raise ValueError(f"checkpoint {checkpoint} is of {search.step} steps, more than the {steps} asked for")
    return saved[1]


def read_checkpoint(
    path: str | Path, identity: dict[str, Any], names: tuple[str, ...] = Descent.names
) -> tuple[dict[str, Tensor], int | None] | None:
    """The state of a search and its rollouts, if any, at once; None if no file is there yet: then it can be written."""
    if can_begin(path):
        return None
    tensors, saved = load_tensors(path, names)
    # What checkpoints were of before they said it.
    older = {"method": "mtv", "estimator": "reinforce", "prompts_per_step": 1, "loss": "first_token"}
    older["weights"] = identity.get("weights")
    saved = older | saved
    differing = sorted(key for key in identity if saved.get(key) != identity[key])
    if differing:
        was, now = ({key: one.get(key) for key in differing} for one in (saved, identity))
        raise ValueError(f"checkpoint {path} is of another search: it has {was}, expected {now}")
    at_once: Any = saved.get("at_once", identity.get("rollouts"))
    return tensors, at_once
