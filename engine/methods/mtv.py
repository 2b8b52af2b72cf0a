"""MTV-EXTRACT: which heads must carry the mean activations of a task (Multimodal Task Vectors, arXiv 2406.15334).

    theta [L, H];  p = sigmoid(theta)
    each step, on one example:
        lambda_k ~ Bernoulli(p)                          k = 1..32 rollouts
        L_k = cross-entropy of the answer's first token, with z[l, h] := mean[l, h] where lambda_k[l, h]
        theta <- Adam(theta, grad of sum_k log p(lambda_k) A_k)
    heads = one draw from p, or the best of several

The 32 rollouts of a step are rows of one forward; prompts come back, so their prefixes are kept.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from engine.artifacts import TaskVector, load_tensors, save_tensors
from engine.intervention import read_values
from engine.prefix import Prefix, PrefixPool
from engine.progress import track
from engine.tasks.scoring import Example, first_token, first_token_losses
from models import Model
from models.shapes import Bool, Float


@dataclass(frozen=True)
class Preset:
    """Where the paper and its reference code differ.

    steps:      default number of steps.
    init:       of theta; None: standard normal.
    clamp:      probabilities stay in [clamp, 1 - clamp].
    normalise:  advantage (L - mean) / (std + 1e-3), log-probabilities summed over rollouts; else A = L, averaged.
    in_order:   examples taken one after the other; else drawn with replacement.
    candidates: draws of heads, of which the best on the validation examples is kept.
    """

    steps: int
    init: float | None
    clamp: float
    normalise: bool
    in_order: bool
    candidates: int


PRESETS = {
    "paper": Preset(steps=100, init=None, clamp=0.0, normalise=False, in_order=True, candidates=1),
    "reference": Preset(steps=600, init=-1.0, clamp=1e-3, normalise=True, in_order=False, candidates=10),
}


@dataclass(frozen=True)
class Step:
    """What a progress line shows of one step."""

    step: int
    steps: int
    loss: float
    heads: float
    rollouts_per_second: float


def extract(
    model: Model,
    examples: Sequence[Example],
    means: Float[Tensor, "layers heads head_dim"],
    *,
    preset: str = "reference",
    steps: int | None = None,
    rollouts: int = 32,
    lr: float = 0.1,
    seed: int = 0,
    validation: Sequence[Example] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> TaskVector:
    """Search by REINFORCE for the heads that, replaced by their means, make the model do a task without examples.

    examples:   (prompt, answer) pairs, formatted as the task will be asked: zero-shot, as a rule.
    means:      from `mean_activations` over many-shot prompts of the task.
    preset:     "reference" (the authors' code, default) or "paper"; see `PRESETS` for what they change.
    steps:      default the preset's (600 or 100). rollouts: head masks a step. lr: of Adam.
    validation: examples that choose among the candidates; default 50 of `examples` (as the reference code does).
    checkpoint: a file. Written every `checkpoint_every` steps; if it is there, the search goes on from it and ends with
                the same theta, bit by bit, as one that was never interrupted (same machine and number of threads).
    on_step:    called after every step, in place of the progress bar.

    Raises ValueError for an unknown preset, wrong means, no examples, an answer that is not text, a checkpoint of
    another search, or losses that are not finite. OSError if the checkpoint cannot be written, before the search.

    Source: Algorithm 1 of the paper, and its public code.

    >>> vector = engine.mtv.extract(model, [Example("Q: hot\\nA:", " cold")], means, steps=2, progress=False)
    >>> vector.mask.shape == (model.shape.n_layers, model.shape.n_heads)
    True
    """
    chosen, steps = read_options(preset, steps, rollouts, lr)
    if checkpoint_every < 1:
        raise ValueError(f"expected checkpoint_every >= 1, got checkpoint_every={checkpoint_every}")
    if not examples:
        raise ValueError("no examples were given")
    shape = (model.shape.n_layers, model.shape.n_heads)
    means = read_values(model.shape, means, torch.ones(1, *shape, dtype=torch.bool))
    if means.ndim != 3:
        raise ValueError(f"means must have shape {[*shape, model.shape.head_dim]}, got {list(means.shape)}")
    targets = [first_token(model, example) for example in examples]
    pool = PrefixPool(model, [example.prompt for example in examples])
    for example in validation or ():  # what is wrong with them is said now, not after the search
        first_token(model, example)
        model.read(example.prompt)

    settings = dict(preset=preset, rollouts=rollouts, lr=lr, seed=seed)
    search = Search(chosen, shape, lr, seed)
    identity = _identity(model, means, pool.prompts, targets, settings)
    if checkpoint is not None:
        search.resume(checkpoint, identity)
        if search.step > steps:
            raise ValueError(f"checkpoint {checkpoint} is of {search.step} steps, more than the {steps} asked for")

    for step in track(range(search.step, steps), f"MTV-EXTRACT ({rollouts} rollouts a step)", progress and not on_step):
        started = time.perf_counter()
        index = search.draw_example(len(examples))
        masks = search.draw(rollouts)
        losses = first_token_losses(model, [pool[index]], [targets[index]], heads=masks, values=means)[0]
        if not losses.isfinite().all():
            raise ValueError(f"step {step}: the loss of example {index} ({examples[index].prompt!r:.60}) is not finite")
        search.update(masks, losses)
        if checkpoint is not None and (search.step % checkpoint_every == 0 or search.step == steps):
            search.save(checkpoint, identity)
        if on_step:
            rate = rollouts / (time.perf_counter() - started)
            on_step(Step(search.step, steps, search.losses[-1], search.probabilities().sum().item(), rate))

    mask, validation_loss = _choose(model, search, means, examples, targets, pool, validation)
    metadata = dict(
        settings,
        method="mtv",
        model=model.name,
        shape=asdict(model.shape),
        steps=steps,
        validation_loss=validation_loss,
        losses=search.losses,
        versions=_versions(),
    )
    return TaskVector(mask, means.detach().float().cpu(), search.probabilities(), metadata)


def read_options(preset: str, steps: int | None, rollouts: int, lr: float = 0.1) -> tuple[Preset, int]:
    """The preset of that name, and the number of steps to make. Raises ValueError for what cannot be run."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    chosen = PRESETS[preset]
    steps = chosen.steps if steps is None else steps
    if steps < 1 or rollouts < 2 or not lr > 0:
        raise ValueError(f"expected steps >= 1, rollouts >= 2, lr > 0, got steps={steps}, rollouts={rollouts}, lr={lr}")
    return chosen, steps


class Search:
    """theta, and all that must be kept to go on with it: Adam's moments, the random state, the losses so far."""

    def __init__(self, preset: Preset, shape: tuple[int, int], lr: float, seed: int):
        self.preset = preset
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
        return self.step % n if self.preset.in_order else int(torch.randint(n, (), generator=self.random))

    def draw(self, rollouts: int) -> Bool[Tensor, "rollouts layers heads"]:
        p = self.probabilities().expand(rollouts, -1, -1)
        return torch.bernoulli(p, generator=self.random).bool()

    def update(self, masks: Bool[Tensor, "rollouts layers heads"], losses: Float[Tensor, " rollouts"]) -> None:
        """One REINFORCE step: heads of rollouts with a high loss become less likely."""
        log_p = -torch.nn.functional.binary_cross_entropy(
            self._p().expand(masks.shape), masks.float(), reduction="none"
        ).sum(dim=(1, 2))
        if self.preset.normalise:
            policy_loss = (log_p * (losses - losses.mean()) / (losses.std() + 1e-3)).sum()
        else:
            policy_loss = (log_p * losses).mean()
        self.adam.zero_grad()
        policy_loss.backward()
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

    def resume(self, path: str | Path, identity: dict[str, Any]) -> None:
        """Go on from a checkpoint, if it is there; else see that it can be written."""
        if not Path(path).exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
            Path(path).unlink()
            return
        tensors, saved = load_tensors(path, ("theta", "exp_avg", "exp_avg_sq", "random", "losses"))
        differing = sorted(key for key in identity if saved.get(key) != identity[key])
        if differing:
            was, now = ({key: one.get(key) for key in differing} for one in (saved, identity))
            raise ValueError(f"checkpoint {path} is of another search: it has {was}, expected {now}")
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


def _choose(
    model: Model,
    search: Search,
    means: Tensor,
    examples: Sequence[Example],
    targets: Sequence[int],
    pool: PrefixPool,
    validation: Sequence[Example] | None,
) -> tuple[Bool[Tensor, "layers heads"], float]:
    """The candidate with the lowest mean loss on the validation examples, and that loss."""
    candidates = search.draw(search.preset.candidates)
    if validation:
        prompts: Sequence[Any] = [example.prompt for example in validation]
        targets = [first_token(model, example) for example in validation]
    else:
        some = torch.randperm(len(examples), generator=search.random)[:50].tolist()
        prompts, targets = [pool[i] for i in some], [targets[i] for i in some]
    losses = first_token_losses(model, prompts, targets, heads=candidates, values=means).mean(dim=0)
    best = int(losses.argmin())
    return candidates[best], losses[best].item()


def _identity(
    model: Model, means: Tensor, prompts: Sequence[Prefix], targets: Sequence[int], settings: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued."""
    digest = hashlib.sha256(means.detach().float().cpu().numpy().tobytes())
    digest.update(json.dumps([[p.tokens.tolist() for p in prompts], list(targets)]).encode())
    for prompt in prompts:
        for pixels in prompt.prompt.inputs.values():
            digest.update(pixels.cpu().numpy().tobytes())
    return dict(settings, model=model.name, shape=asdict(model.shape), data=digest.hexdigest()[:16])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("headpatch", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found
