"""Pictures of a search: which heads it chose, and how the loss fell. Needs matplotlib, `headpatch[plots]`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.artifacts import write_whole
from models.shapes import Bool, Float


def heatmap(
    path: str | Path,
    probabilities: Float[Tensor, "layers heads"],
    chosen: Bool[Tensor, "layers heads"] | None = None,
    title: str = "",
) -> None:
    """Layer x head map of probabilities as PNG; chosen heads carry a dot."""
    n_layers, n_heads = probabilities.shape
    figure, axes = _figure(0.22 * n_layers + 2.5, 0.22 * n_heads + 1.6)
    image = axes.imshow(probabilities.T.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="equal")
    if chosen is not None:
        layers, heads = chosen.nonzero(as_tuple=True)
        axes.scatter(layers, heads, s=9, c="white", edgecolors="black", linewidths=0.6, label="chosen")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set(xlabel="layer", ylabel="head", title=title)
    axes.set_xticks(range(0, n_layers, max(1, n_layers // 10)))
    axes.set_yticks(range(0, n_heads, max(1, n_heads // 8)))
    figure.colorbar(image, ax=axes, label="probability", shrink=0.7)
    _save(figure, path)


def learning_curve(path: str | Path, losses: Sequence[float], title: str = "") -> None:
    """Loss of each step, mean over its rollouts, with a running mean over ten steps, as PNG."""
    figure, axes = _figure(6.0, 3.2)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db4c0", linewidth=1, label="step")
    window = min(10, len(losses))
    smooth = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(dim=1)
    axes.plot(range(window, len(losses) + 1), smooth, color="#253237", linewidth=2, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="cross-entropy of the answer (nats)", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue())
