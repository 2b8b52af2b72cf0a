"""The state of a search for heads: theta, its draws and updates, and the checkpoint it goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from engine.artifacts import can_begin, load_tensors, save_tensors
from engine.methods.estimators import Estimator, leave_one_out
from engine.methods.options import Preset
from models.shapes import Bool, Float


class Search:
    """theta, and all that must be kept to go on with it: Adam's moments, the random state, the losses so far."""

    def __init__(
        self, preset: Preset, shape: tuple[int, int], lr: float, seed: int, estimator: Estimator = "reinforce"
    ):
        self.preset = preset
        self.estimator = estimator
        self.random = Generator().manual_seed(seed)
        theta = torch.randn(shape, generator=self.random) if preset.init is None else torch.full(shape, preset.init)
        self.theta = theta.requires_grad_()
        self.adam = torch.optim.Adam([self.theta], lr=lr)
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def _p(self) -> Float[Tensor, "layers heads"]:
        return self.theta.sigmoid().clamp(self.preset.clamp, 1 - self.preset.clamp)

    def probabilities(self) -> Float[Tensor, "layers heads"]:
        return self._p().detach()

    def draw_example(self, n: int) -> int:
        return self.draw_examples(n, 1)[0]

    def draw_examples(self, n: int, count: int) -> list[int]:
        if self.preset.in_order:
            return [(self.step * count + i) % n for i in range(count)]
        return torch.randint(n, (count,), generator=self.random).tolist()

    def draw(self, rollouts: int) -> Bool[Tensor, "rollouts layers heads"]:
        return self._draw(self.probabilities(), rollouts)

    def draw_candidates(self, threshold: float) -> Bool[Tensor, "candidates layers heads"]:
        """From sigmoid(theta) itself, nothing clamped; heads of a probability up to `threshold` are left out."""
        p = self.theta.detach().sigmoid()
        return self._draw(p.masked_fill(p <= threshold, 0), self.preset.candidates)

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
            policy_loss = (log_p * (losses - losses.mean()) / (losses.std() + 1e-3)).sum()
        else:
            policy_loss = (log_p * losses).mean()
        self._descend(policy_loss, losses)

    def follow(self, gradient: Float[Tensor, "layers heads"], losses: Float[Tensor, "prompts rollouts"]) -> None:
        """One step by gates: what the loss gains or loses with each is passed on to its probability."""
        self._descend((self._p() * gradient).sum(), losses)

    def _descend(self, objective: Tensor, losses: Tensor) -> None:
        self.adam.zero_grad()
        objective.backward()
        self.adam.step()
        self.losses.append(losses.mean().item())

    def save(self, path: str | Path, identity: dict[str, Any]) -> None:
        state = self.adam.state[self.theta]
        tensors = {
            "theta": self.theta,
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
            "random": self.random.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        save_tensors(path, tensors, identity)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what was saved."""
        with torch.no_grad():
            self.theta.copy_(tensors["theta"])
        self.losses = tensors["losses"].tolist()
        step = torch.tensor(float(self.step))
        self.adam.state[self.theta] = {
            "step": step,
            "exp_avg": tensors["exp_avg"],
            "exp_avg_sq": tensors["exp_avg_sq"],
        }
        self.random.set_state(tensors["random"])


def read_checkpoint(path: str | Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], int] | None:
    """The state of a search and its rollouts at once; None if no file is there yet, and then it can be written."""
    if can_begin(path):
        return None
    tensors, saved = load_tensors(path, ("theta", "exp_avg", "exp_avg_sq", "random", "losses"))
    older = {"estimator": "reinforce", "prompts_per_step": 1, "loss": "first_token"}  # which were of nothing else
    saved = older | saved
    differing = sorted(key for key in identity if saved.get(key) != identity[key])
    if differing:
        was, now = ({key: one.get(key) for key in differing} for one in (saved, identity))
        raise ValueError(f"checkpoint {path} is of another search: it has {was}, expected {now}")
    at_once: Any = saved.get("at_once", identity["rollouts"])
    return tensors, at_once
