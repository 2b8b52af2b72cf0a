"""What composition begins with: a base, a head of each set on its features, an encoder finetuned on each set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.experiments.composition.sets import Labelled
from engine.progress import track
from models.shapes import Float


class Heads(nn.Module):
    """A linear head for each set, one after the other in one matrix: logits of a set are some of its rows."""

    def __init__(self, width: int, classes: Sequence[int]):
        super().__init__()
        self.classes = tuple(classes)
        self.all = nn.Linear(width, sum(classes))

    def losses(self, h: Float[Tensor, "batch width"], sets: Tensor, labels: Tensor) -> Float[Tensor, " batch"]:
        """Cross-entropy of each sample among its own set's classes."""
        return F.cross_entropy(self._logits(h, sets), labels, reduction="none")

    def right(self, h: Float[Tensor, "batch width"], sets: Tensor, labels: Tensor) -> Tensor:
        return self._logits(h, sets).argmax(dim=1) == labels

    def even(self, h: Float[Tensor, "batch width"], sets: Tensor) -> Float[Tensor, " batch"]:
        """Cross-entropy to the even distribution, less its least value: 0 where nothing is known of the label."""
        logits = self._logits(h, sets)
        counts = torch.tensor(self.classes, device=sets.device)[sets]
        logp = logits.log_softmax(dim=1).masked_fill(logits == -math.inf, 0)
        return -logp.sum(dim=1) / counts - counts.to(logp).log()

    def _logits(self, h: Tensor, sets: Tensor) -> Float[Tensor, "batch classes"]:
        """[batch, most classes]; -inf where the sample's set has none."""
        logits, most = self.all(h), max(self.classes)
        starts = torch.tensor([0, *self.classes[:-1]]).cumsum(0)
        at = starts[sets].unsqueeze(1) + torch.arange(most)
        counts = torch.tensor(self.classes)[sets].unsqueeze(1)
        found = logits.gather(1, at.clamp_max(logits.shape[1] - 1))
        return found.masked_fill(torch.arange(most) >= counts, -math.inf)


def joined(parts: Sequence[Labelled]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs of all sets below each other, the set of each sample, its label."""
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    sets = torch.cat([torch.full((len(part),), at) for at, part in enumerate(parts)])
    return inputs, sets, torch.cat([part.labels for part in parts])


def train(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    samples: int,
    *,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 64,
    label: str = "training",
    progress: bool = True,
) -> None:
    """AdamW with weight decay 0.01; the rate rises for a tenth of the steps, then falls by a cosine."""
    adam = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    random = Generator().manual_seed(seed)
    for step in track(range(steps), label, progress):
        rate = min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in adam.param_groups:
            group["lr"] = lr * rate
        adam.zero_grad()
        loss(torch.randint(samples, (batch,), generator=random)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()


def pretrained(
    encoder: nn.Module, parts: Sequence[Labelled], *, steps: int, lr: float, seed: int, progress: bool = True
) -> nn.Module:
    """A base trained on all sets at once, for too few steps to be good at any."""
    inputs, sets, labels = joined(parts)
    heads = Heads(encoder(**_rows(inputs, torch.arange(1))).shape[1], [len(part.classes) for part in parts])
    parameters = [*encoder.parameters(), *heads.parameters()]

    def loss(at: Tensor) -> Tensor:
        return heads.losses(encoder(**_rows(inputs, at)), sets[at], labels[at]).mean()

    train(parameters, loss, len(labels), steps=steps, lr=lr, seed=seed, label="base", progress=progress)
    return encoder


def fitted_heads(encoder: nn.Module, parts: Sequence[Labelled], c: float = 1.0) -> Heads:
    """Logistic regressions on the base's features (`regression`); they stay as they are from here on."""
    found = []
    for part in parts:
        seen = len(part.labels.unique())
        if seen < len(part.classes):
            raise ValueError(f"set {part.name!r} has samples of {seen} of its {len(part.classes)} classes: give more")
        found.append(regression(features_of(encoder, part), part.labels, c))
    heads = Heads(found[0][0].shape[1], [len(part.classes) for part in parts])
    with torch.no_grad():
        heads.all.weight.copy_(torch.cat([w for w, _ in found]))
        heads.all.bias.copy_(torch.cat([b for _, b in found]))
    return heads.requires_grad_(False)


def regression(h: Float[Tensor, "samples width"], labels: Tensor, c: float = 1.0) -> tuple[Tensor, Tensor]:
    """scikit-learn's logistic regression on standardised features, as weights [classes, width] and biases of raw ones.

    c: inverse strength of its regularisation. Numbers of a feature that (nearly) never change get no weight: MiniLM has
    some of size 1e-33.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    spread = h.std(dim=0)
    live = spread > 1e-6 * spread.max()
    scaler, found = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(
        h[:, live].numpy(), labels.numpy()
    )
    w, b = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if len(w) == 1:  # of two classes: log-odds of the second
        w, b = torch.cat([-w / 2, w / 2]), torch.cat([-b / 2, b / 2])
    w = w / torch.from_numpy(scaler.scale_)
    whole = w.new_zeros(len(w), h.shape[1])
    whole[:, live] = w
    return whole.to(h), (b - w @ torch.from_numpy(scaler.mean_)).to(h)


def finetuned(
    base: nn.Module, heads: Heads, part: Labelled, at: int, *, steps: int, lr: float, seed: int, progress: bool = True
) -> nn.Module:
    """A copy of the base trained on one set, its head as it is. at: of the set."""
    encoder = deepcopy(base)
    sets = torch.full((len(part),), at)

    def loss(rows: Tensor) -> Tensor:
        return heads.losses(encoder(**_rows(part.inputs, rows)), sets[rows], part.labels[rows]).mean()

    kept = [p for name, p in encoder.named_parameters() if "word_embeddings" not in name]
    train(kept, loss, len(part), steps=steps, lr=lr, seed=seed, label=f"finetuning on {part.name}", progress=progress)
    return encoder


@torch.no_grad()
def features_of(encoder: nn.Module, part: Labelled | dict[str, Tensor]) -> Float[Tensor, "samples width"]:
    inputs: dict[str, Any] = part.inputs if isinstance(part, Labelled) else part
    count = len(next(iter(inputs.values())))
    return torch.cat([encoder(**_rows(inputs, at)) for at in torch.arange(count).split(256)])


def _rows(inputs: dict[str, Tensor], at: Tensor) -> dict[str, Tensor]:
    return {name: x[at] for name, x in inputs.items()}
