"""Pictures: which heads a search chose, how its loss fell, what a sweep found. Needs matplotlib, `headpatch[plots]`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.artifacts import write_whole
from models.shapes import Bool, Float

# Okabe and Ito's, which the colour-blind can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
SQUARE = 64  # rows or columns up to which a map's cells are squares
LARGEST = 400  # inches, at 150 dots each, beyond which a picture cannot be made


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
    axes.set(xlabel="layer", ylabel="head")
    axes.set_title(drawable(title), parse_math=False)
    axes.set_xticks(range(0, n_layers, max(1, n_layers // 10)))
    axes.set_yticks(range(0, n_heads, max(1, n_heads // 8)))
    figure.colorbar(image, ax=axes, label="probability", shrink=0.7)
    _save(figure, path)


def effect_maps(
    path: str | Path,
    means: Float[Tensor, "maps rows columns"],
    marked: Bool[Tensor, "maps rows columns"],
    label: str,
    names: tuple[Sequence[int | str], Sequence[int | str]],
    axes_names: tuple[str, str],
    titles: Sequence[str] = (),
    title: str = "",
) -> None:
    """Maps of effects, one under the other, as PNG: blue below zero, white at it, red above; one scale.

    marked: what carries a dot. label: of the scale. names: of rows and of columns; numbers are left out where they are
    many. axes_names: what rows and columns are. titles: of the maps. Raises ValueError for more than a picture holds.
    """
    n_maps, n_rows, n_columns = means.shape
    rows, columns = names
    width, height = _inches(columns), _inches(rows)
    if max(width, n_maps * (height + 1.2)) > LARGEST:
        raise ValueError(
            f"a picture does not hold {n_maps} maps of {n_rows} x {n_columns}: take fewer positions, or use top()"
        )
    wide = 0.08 * max((len(name) for name in rows if isinstance(name, str)), default=0)
    tall = 0.08 * max((len(name) for name in columns if isinstance(name, str)), default=0)
    whole = max((height + tall + 1.2) * n_maps + 0.4, 3.0)  # or the scale's label does not fit
    figure, grid = _figure(max(width, 2.5) + wide + 2.5, whole, n_maps)
    bound, top = float(means.abs().max()) or 1.0, f"top {int(marked.sum())}"
    aspect = "equal" if max(n_rows, n_columns) <= SQUARE else "auto"
    for at, axes in enumerate(grid):
        image = axes.imshow(
            means[at].numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, aspect=aspect, interpolation="nearest"
        )
        y, x = marked[at].nonzero(as_tuple=True)
        axes.scatter(x, y, s=9, c="white", edgecolors="black", linewidths=0.6, label=top)
        axes.set_ylabel(axes_names[0])
        axes.set_title(drawable(titles[at]) if titles else "", parse_math=False)
        _ticks(axes.set_xticks, columns, 10, rotation=90)
        _ticks(axes.set_yticks, rows, 8)
    grid[-1].set_xlabel(axes_names[1])
    figure.suptitle(drawable(title), parse_math=False)
    if marked.any():
        grid[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    shrink, anchor = (0.7, (0.0, 0.5)) if whole < 6 else (4 / whole, (0.0, 1.0))
    figure.colorbar(image, ax=grid, label=label, shrink=1.0 if whole < 2.5 else shrink, anchor=anchor)
    _save(figure, path)


def drawable(text: str) -> str:
    """Characters that the fonts in use lack as their code points: drawn, they would be boxes that all look the same."""
    from matplotlib import font_manager, rcParams

    files = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in rcParams["font.family"]]
    fonts = [font_manager.get_font(file) for file in files]
    return "".join(
        c if c == "\n" or any(font.get_char_index(ord(c)) for font in fonts) else c.encode("unicode_escape").decode()
        for c in text
    )


def _inches(names: Sequence[int | str]) -> float:
    """Of an axis: room to read every name; where there are many numbers, to see every row."""
    if len(names) <= SQUARE or not _numbers(names):
        return 0.22 * len(names)
    return max(0.22 * SQUARE, len(names) / 100)


def _ticks(put: Any, names: Sequence[int | str], most: int, **style: Any) -> None:
    """All names, or about so many numbers, at even steps from the first."""
    if _numbers(names):
        step = next(
            size * 10**power for power in range(9) for size in (1, 2, 5) if size * 10**power >= len(names) // most
        )
        at = range(0, len(names), step)
        put(at, [str(names[i]) for i in at])
    else:
        at = range(len(names) if any(names) else 0)
        put(at, [drawable(str(names[i])) for i in at], parse_math=False, fontsize=8, **style)


def _numbers(names: Sequence[int | str]) -> bool:
    return all(isinstance(name, int) for name in names)


def learning_curve(path: str | Path, losses: Sequence[float], title: str = "") -> None:
    """Loss of each step, mean over its rollouts, with a running mean over ten steps, as PNG."""
    figure, axes = _figure(6.0, 3.2)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db4c0", linewidth=1, label="step")
    window = min(10, len(losses))
    smooth = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(dim=1)
    axes.plot(range(window, len(losses) + 1), smooth, color="#253237", linewidth=2, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="cross-entropy of the answer (nats)")
    axes.set_title(drawable(title), parse_math=False)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)


def by_layer(
    path: str | Path, lines: Mapping[str, Sequence[float]], without: Mapping[str, float], title: str = ""
) -> None:
    """Accuracy with a vector added after each layer, a line a kind of prompt; dashed: without the vector."""
    figure, axes = _figure(7.0, 3.6)
    for color, (name, accuracies) in zip(("#0072B2", "#D55E00", "#009E73"), lines.items(), strict=False):
        axes.plot(range(len(accuracies)), accuracies, marker="o", markersize=3, color=color, label=drawable(name))
        axes.axhline(without[name], linestyle="--", linewidth=1, color=color, label=drawable(f"{name}, without"))
    axes.set(xlabel="layer the vector is added after", ylabel="first-token accuracy", ylim=(-0.02, 1))
    axes.set_title(drawable(title), parse_math=False)
    _legend(axes, fontsize=8)
    _save(figure, path)


def scores(path: str | Path, values: Mapping[str, Mapping[str, Sequence[float]]], label: str, title: str = "") -> None:
    """By task and way to ask: a bar at the mean over seeds, whiskers of one standard deviation, a dot a seed."""
    ways = list(dict.fromkeys(way for of_task in values.values() for way in of_task))
    n_bars = sum(len(of_task) for of_task in values.values())
    figure, axes = _figure(8.0, 0.32 * (n_bars + len(values)) + 1.2)
    at, ticks, names = 0.0, [], []
    for task, of_task in values.items():
        for way, seeds in of_task.items():
            found = torch.tensor(seeds, dtype=torch.float64)
            spread = found.std().item() if len(seeds) > 1 else 0.0
            color = COLORS[ways.index(way) % len(COLORS)]
            axes.barh(at, found.mean().item(), xerr=spread or None, color=color, height=0.8, capsize=3, alpha=0.8)
            axes.scatter(seeds, [at] * len(seeds), s=10, color="black", zorder=3)
            ticks.append(at)
            names.append(f"{task}: {way}" if len(values) > 1 else way)
            at += 1
        at += 0.6
    axes.set_yticks(ticks, [drawable(name) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.set_title(drawable(title), parse_math=False)
    axes.set_xlim(left=0, right=1 if "accuracy" in label else None)
    _save(figure, path)


def faithfulness(
    path: str | Path,
    sizes: Sequence[float],
    values: Float[Tensor, " sizes"],
    band: tuple[Float[Tensor, " sizes"], Float[Tensor, " sizes"]] | None = None,
    title: str = "",
) -> None:
    """Faithfulness by the share of items that are kept, as PNG; the whole model's is 1."""
    figure, axes = _figure(6.0, 3.6)
    axes.plot(sizes, values, marker="o", color=COLORS[0])
    if band is not None:
        axes.fill_between(sizes, band[0], band[1], color=COLORS[0], alpha=0.2, linewidth=0)
    axes.axhline(1, linestyle="--", linewidth=1, color="#999999")
    axes.set(xlabel="share of the items kept", ylabel="faithfulness", xscale="log")
    axes.set_title(drawable(title), parse_math=False)
    _save(figure, path)


def scaling(path: str | Path, curves: Mapping[str, Mapping[int, Sequence[float]]], title: str = "") -> None:
    """Accuracy by the number of examples behind the means, a line a task: mean over seeds, band of one deviation."""
    figure, axes = _figure(6.5, 3.8)
    for color, marker, (task, points) in zip(COLORS, "osD^vPX", curves.items(), strict=False):
        counts = sorted(points)
        found = [torch.tensor(points[count], dtype=torch.float64) for count in counts]
        mean = torch.stack([one.mean() for one in found])
        spread = torch.stack([one.std() if len(one) > 1 else torch.zeros_like(one[0]) for one in found])
        axes.plot(counts, mean, marker=marker, color=color, label=drawable(task))
        axes.fill_between(counts, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    axes.set(xlabel="examples behind the mean activations", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_title(drawable(title), parse_math=False)
    _legend(axes, frameon=False)
    _save(figure, path)


def _legend(axes: Any, **style: Any) -> None:
    """Names as they are: a dollar sign begins no formula."""
    for text in axes.legend(**style).get_texts():
        text.set_parse_math(False)


def _figure(width: float, height: float, panels: int | None = None) -> tuple[Any, Any]:
    """A figure and its axes; a list of axes, one under the other, if `panels` are asked for."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    if panels is None:
        return figure, figure.subplots()
    return figure, list(figure.subplots(panels, squeeze=False)[:, 0])


def _save(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue())
