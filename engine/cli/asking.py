"""`headpatch trace` and `circuit`: what each part of a model does for a task, and how much the first of them carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import engine
import models
from engine import tasks
from engine.artifacts import write_whole
from engine.cli import console
from engine.cli.console import ModelName, Quiet, list_files, out, say

Contrast = Annotated[tasks.ContrastName, typer.Option(help=f"{', '.join(tasks.CONTRASTS)}.")]
Count = Annotated[int, typer.Option(help="Pairs of prompts.")]
Seed = Annotated[int, typer.Option(help="Of the pairs.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where results go; default out/TASK-COMMAND.")]
RANKS = ("attribution", "sweep", "edges")


def trace(
    model: ModelName = "smollm2-135m",
    task: Contrast = "ioi",
    site: Annotated[str, typer.Option(help="resid_pre, z, mlp_out, ...: what engine.Patch names.")] = "resid_pre",
    positions: Annotated[
        str, typer.Option(help="named (subject, end, ...), all (pairs of one length), together, or last.")
    ] = "named",
    count: Count = 20,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(help="Rows of the table.")] = 10,
    folder: Out = None,
    quiet: Quiet = False,
) -> None:
    """Patch every unit of a site, from the corrupted prompts into the clean ones: which of them carry the answer?"""
    with console.plain_errors():
        if positions not in ("named", "all", "together", "last"):
            raise ValueError(f"--positions must be named, all, together or last, got {positions!r}")
        folder = Path("out") / f"{task}-trace" if folder is None else folder
        console.make_folder(folder)
        lm = models.load(model)
        pairs = tasks.contrast(task, lm, count, seed, same_length=positions == "all")
        say(f"{lm.name}: {lm.shape}; {len(pairs)} pairs of {task}")
        where: Any = {"named": pairs.positions, "last": -1}.get(positions, positions)
        effects = engine.sweep(lm, pairs.prompts, site=site, positions=where, progress=not quiet, **asked(pairs))  # type: ignore[arg-type]
        summary = effects.summary(resamples=2000) if len(pairs) > 1 else effects.to_dataframe()
        by = summary.assign(size=summary["mean" if len(pairs) > 1 else "effect"].abs())
        shown = by.sort_values("size", ascending=False).drop(columns="size").head(top)
        table = Table(title=f"{task}, {site}: effect on the logit difference, {effects.clean.mean():.2f} unpatched")
        for column in shown.columns:
            table.add_column(str(column), justify="right")
        for row in shown.itertuples(index=False):
            table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
        out.print(table)
        effects.save(folder / "effects.safetensors")
        effects.heatmap(folder / "map.png", title=f"{task}, {site}")
        effects.show(folder / "effects.html", resamples=2000, title=f"{task}, {site}, {lm.name}")
        list_files(folder, ("effects.html", "map.png", "effects.safetensors"))


def circuit(
    model: ModelName = "smollm2-135m",
    task: Contrast = "ioi",
    rank: Annotated[str, typer.Option(help=f"What ranks the heads, or edges: {', '.join(RANKS)}.")] = "attribution",
    by: Annotated[
        str, typer.Option(help="absolute, or negative: what lowers the metric most when ablated.")
    ] = "negative",
    count: Count = 20,
    seed: Seed = 0,
    folder: Out = None,
    quiet: Quiet = False,
) -> None:
    """Rank heads (or edges) on some pairs, keep the first of them on others: how much of the answer is left?"""
    with console.plain_errors():
        if rank not in RANKS:
            raise ValueError(f"--rank must be one of {', '.join(RANKS)}, got {rank!r}")
        folder = Path("out") / f"{task}-circuit" if folder is None else folder
        console.make_folder(folder)
        lm = models.load(model)
        drawn = tasks.contrast(task, lm, 2 * count, seed)
        ranked_on, held_out = drawn.take(range(count)), drawn.take(range(count, 2 * count))
        say(f"{lm.name}: {lm.shape}; {count} pairs of {task} to rank on, {count} others")
        given: dict[str, Any] = dict(prompts=ranked_on.prompts, progress=not quiet, **asked(ranked_on))
        if rank == "edges":
            ranking = engine.attribute(lm, edges=True, steps=5, **given)
        else:
            verb = engine.sweep if rank == "sweep" else engine.attribute
            ranking = verb(lm, positions="together", **given)
        more = dict(by=by, progress=not quiet, **asked(held_out))
        curve = engine.circuits.faithfulness(lm, held_out.prompts, ranking, **more)
        intervals: Any = zip(*curve.interval(), strict=True) if count > 1 else [()] * len(curve.sizes)  # one has none
        table = Table(title=f"{task}: faithfulness of circuits, CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}")
        for column in ("kept", "items", "logit difference", "faithfulness", *["95% interval"] * (count > 1)):
            table.add_column(column, justify="right")
        rows = zip(curve.sizes, curve.counts, curve.metric.mean(dim=0), curve.faithfulness, intervals, strict=True)
        for size, items, metric, share, ends in rows:
            told = [" to ".join(f"{end:.2f}" for end in ends)] if ends else []
            table.add_row(f"{size:.1%}", str(items), f"{metric:.2f}", f"{share:.2f}", *told)
        out.print(table)
        out.print(f"first: {', '.join(curve.items[:10])}", highlight=False)
        ranking.save(folder / "ranking.safetensors")
        curve.save(folder / "curve.safetensors")
        curve.plot(folder / "curve.png", f"{task}, {lm.name}, ranked by {rank}")
        described = dict(cpr=curve.cpr, cmd=curve.cmd, faithfulness=curve.faithfulness.tolist(), **curve.metadata)
        write_whole(folder / "results.json", json.dumps(described) + "\n")
        list_files(folder, ("curve.png", "curve.safetensors", "ranking.safetensors", "results.json"))


def asked(pairs: tasks.Contrast) -> dict[str, Any]:
    """Sources and answers of pairs, as verbs take them."""
    return dict(source=pairs.source, targets=pairs.targets, others=pairs.others, metric="logit_difference")
