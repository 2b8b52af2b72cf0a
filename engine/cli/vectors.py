"""`headpatch fv`, `apply` and `info`: a function vector found; what a saved task vector answers, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import engine
import models
from engine import plots, tasks
from engine.answers.evaluation import wilson
from engine.artifacts import write_whole
from engine.cli import console
from engine.cli.console import ModelName, PatchedTokens, Quiet, TaskName, interval, out, say


def fv(
    model: ModelName = "smollm2-135m",
    task: TaskName = "antonyms",
    k: Annotated[int, typer.Option(help="Heads whose outputs are summed.")] = 10,
    shots: Annotated[int, typer.Option(help="Demonstrations in each prompt.")] = 10,
    prompts: Annotated[int, typer.Option(help="Clean prompts that the means are taken from.")] = 100,
    shuffled: Annotated[int, typer.Option(help="Shuffled prompts that heads are ranked on.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the split and the prompts.")] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Where results go; default out/TASK-fv.")] = None,
    quiet: Quiet = False,
) -> None:
    """Find a function vector, add it after every layer, and measure it on zero-shot and shuffled-label prompts.

    The layer is chosen on validation words, for each kind of prompt; the figures are of held-out words.
    """
    with console.plain_errors():
        opened = tasks.load(task)
        split = opened.split(seed)
        folder = Path("out") / f"{opened.name}-fv" if folder is None else folder
        console.make_folder(folder)
        clean = [example.prompt for example in opened.few_shot(split.train, shots, prompts, seed)]
        corrupted = opened.few_shot(split.train, shots, shuffled, seed + 1, shuffled=True)
        lm = models.load(model)
        say(f"{lm.name}: {lm.shape}")
        vector, effects = engine.fv.extract(
            lm, clean, corrupted, k=k, checkpoint=folder / "checkpoint.safetensors", progress=not quiet
        )
        table = Table(title=f"{opened.name}: first-token accuracy on {len(split.test)} held-out words, {k} heads")
        for column in ("", "without", "95% interval", "with", "95% interval", "after layer"):
            table.add_column(column, justify="right" if column else "left")
        results: dict[str, Any] = {}
        for kind in ("zero-shot", "shuffled labels"):
            held_out, validation = (
                [opened.example(pair) for pair in pairs] for pairs in (split.test, split.validation)
            )
            if kind != "zero-shot":
                held_out, validation = (
                    opened.queries(pairs, split.train, shots, seed + 2, shuffled=True)
                    for pairs in (split.test, split.validation)
                )
            layer = int(engine.fv.hits_by_layer(lm, validation, vector.vector)[:, :-1].float().mean(dim=0).argmax())
            hits = engine.fv.hits_by_layer(lm, held_out, vector.vector)
            each = hits.float().mean(dim=0).tolist()
            before, after = (wilson(int(hits[:, row].sum()), len(hits)) for row in (-1, layer))
            table.add_row(
                kind,
                f"{each[-1]:.2f}",
                interval(before),
                f"{each[layer]:.2f}",
                interval(after),
                str(layer),
            )
            results[kind] = dict(without=each[-1], by_layer=each[:-1], layer=layer, before=before, after=after)
        out.print(table)
        vector.save(folder / "vector.safetensors")
        effects.save(folder / "effects.safetensors")
        effects.heatmap(folder / "heads.png")
        lines, without = ({kind: found[key] for kind, found in results.items()} for key in ("by_layer", "without"))
        plots.by_layer(folder / "layers.png", lines, without, f"{opened.name}, {lm.name}, {k} heads")
        write_whole(folder / "results.json", json.dumps(dict(vector.metadata, heads=vector.heads, **results)) + "\n")
        names = ("vector.safetensors", "effects.safetensors", "heads.png", "layers.png", "results.json")
        console.list_files(folder, names)


def apply(
    vector: Annotated[Path, typer.Argument(help="A vector.safetensors written by `extract`.")],
    queries: Annotated[list[str], typer.Argument(help="Words to answer, or whole prompts with --raw.")],
    model: Annotated[str | None, typer.Option(help="Default: the model that the vector was made with.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the queries as whole prompts, no template.")] = False,
    values_from: Annotated[
        Path | None, typer.Option(help="The vector.safetensors of another task, whose means the heads carry.")
    ] = None,
    shot: Annotated[list[str] | None, typer.Option(help="A demonstration, as in hot=cold; may be repeated.")] = None,
    patched: PatchedTokens = "prompt",
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 20,
) -> None:
    """Answer prompts from the command line with a saved task vector, and without it."""
    with console.plain_errors():
        loaded = engine.TaskVector.load(vector)
        if values_from is not None:
            loaded = loaded.with_values(engine.TaskVector.load(values_from).values)
        shots = [tasks.Pair(*map(str.strip, one.split("=", 1))) for one in shot or () if "=" in one.strip("= ")]
        if len(shots) < len(shot or ()) or (raw and shot):
            raise ValueError(f"expected --shot INPUT=OUTPUT, and not with --raw, got {shot}")
        lm = models.load(model or loaded.metadata["model"])
        loaded.check(lm)
        prompts = queries if raw else [tasks.Task.prompt(shots, query) for query in queries]
        options: dict[str, Any] = dict(patched=console.read_patched(patched), max_new_tokens=max_new_tokens, stop="\n")
        plain = engine.generate(lm, prompts, **options)
        carried = engine.generate(lm, prompts, heads=loaded.heads, values=loaded.values, **options)
        table = Table("query", "without", "with the vector", box=None)
        for row in zip(queries, plain, carried, strict=True):
            table.add_row(*(str(cell).strip() for cell in row))
        out.print(table)


def info(vector: Annotated[Path, typer.Argument(help="A vector.safetensors written by `extract`.")]) -> None:
    """Show what a saved task vector holds."""
    with console.plain_errors():
        loaded = engine.TaskVector.load(vector)
        table = Table(show_header=False, box=None)
        for key, value in loaded.metadata.items():
            if key != "losses":
                table.add_row(key, json.dumps(value) if isinstance(value, dict) else str(value))
        table.add_row("heads", f"{len(loaded.heads)}: " + ", ".join(f"{la}.{h}" for la, h in loaded.heads))
        out.print(table)
