"""The command line: `headpatch extract` finds a task vector, `headpatch apply` answers with it, `info` shows it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError as error:
    raise SystemExit("the command line needs its extra: pip install 'headpatch[cli]'") from error
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import engine
import models
from engine import plots, tasks
from engine.artifacts import write_whole
from engine.evaluation import Score
from engine.methods import mtv

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out = Console()
note = Console(stderr=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend is told in one line, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, IndexError, OSError) as error:
        note.print(f"[red]error:[/red] {error}", highlight=False, markup=True, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def extract(
    model: Annotated[str, typer.Option(help="smollm2-135m, a local folder, or a hub id.")] = "smollm2-135m",
    task: Annotated[str, typer.Option(help=f"{', '.join(tasks.SHIPPED)}, or a JSONL file of input/output pairs.")] = (
        "antonyms"
    ),
    preset: Annotated[str, typer.Option(help=f"Constants of the method: {', '.join(mtv.PRESETS)}.")] = "reference",
    steps: Annotated[int | None, typer.Option(help="Search steps; default the preset's.")] = None,
    rollouts: Annotated[int, typer.Option(help="Head masks tried in a step.")] = 32,
    shots: Annotated[int, typer.Option(help="Demonstrations in each prompt that the means are taken from.")] = 8,
    prompts: Annotated[int, typer.Option(help="Number of such prompts, and of examples to search on.")] = 100,
    icl_shots: Annotated[int, typer.Option(help="Demonstrations of the few-shot baseline.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the split, the prompts and the search.")] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Where results go; default out/TASK.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress lines.")] = False,
) -> None:
    """Find a task vector (MTV-EXTRACT), measure it on held-out words, and save it with pictures.

    A run that is stopped, at any moment, goes on where it was when it is started again.
    """
    with plain_errors():
        mtv.read_options(preset, steps, rollouts)
        opened = tasks.load(task)
        split = opened.split(seed)
        folder = folder or Path("out") / opened.name
        checkpoint = folder / "checkpoint.safetensors"
        many_shot = [example.prompt for example in opened.few_shot(split.train, shots, prompts, seed)]
        icl = opened.queries(split.test, split.train, icl_shots, seed)
        zero_shot = [opened.example(query) for query in split.test]
        pool = [opened.example(query) for query in split.train[:prompts]]
        validation = [opened.example(query) for query in split.validation[:50]]
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--out {folder} is a file, expected a folder")
        folder.mkdir(parents=True, exist_ok=True)

        lm = models.load(model)
        note.print(f"{lm.name}: {lm.shape}", highlight=False)
        started = time.perf_counter()
        means = engine.mean_activations(lm, many_shot, progress=not quiet)
        seconds = {"means": time.perf_counter() - started}
        note.print(f"means of {len(many_shot)} {shots}-shot prompts: {seconds['means']:.1f} s", highlight=False)

        started = time.perf_counter()
        with search_line(quiet) as on_step:
            vector = mtv.extract(
                lm, pool, means, preset=preset, steps=steps, rollouts=rollouts, seed=seed,
                validation=validation, checkpoint=checkpoint, progress=not quiet, on_step=on_step,
            )  # fmt: skip
        seconds["search"] = time.perf_counter() - started
        done = vector.metadata["steps"]
        note.print(
            f"search, {done} steps x {rollouts} rollouts: {seconds['search']:.1f} s; {len(vector.heads)} heads, "
            f"validation loss {vector.metadata['validation_loss']:.2f} nats",
            highlight=False,
        )
        chosen: dict[str, Any] = dict(heads=vector.heads, values=vector.values)
        scores = [
            engine.evaluate(lm, "zero-shot", zero_shot, progress=not quiet),
            engine.evaluate(lm, f"{icl_shots}-shot ICL", icl, progress=not quiet),
            engine.evaluate(lm, "zero-shot + MTV", zero_shot, progress=not quiet, **chosen),
        ]
        out.print(score_table(opened.name, scores))

        vector.metadata.update(task=opened.name, shots=shots, prompts=prompts)
        vector.save(folder / "vector.safetensors")
        title = f"{opened.name}, {lm.name}"
        plots.heatmap(folder / "heads.png", vector.probabilities, vector.mask, title)
        plots.learning_curve(folder / "curve.png", vector.metadata["losses"], title)
        results = {
            "task": opened.name,
            "scores": [asdict(score) | {"accuracy": score.accuracy} for score in scores],
            "seconds": seconds,
            "heads": vector.heads,
            **vector.metadata,
        }
        write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
        checkpoint.unlink(missing_ok=True)
        for name in ("vector.safetensors", "heads.png", "curve.png", "results.json"):
            out.print(folder / name, highlight=False, soft_wrap=True)


@app.command()
def apply(
    vector: Annotated[Path, typer.Argument(help="A vector.safetensors written by `extract`.")],
    queries: Annotated[list[str], typer.Argument(help="Words to answer, or whole prompts with --raw.")],
    model: Annotated[str | None, typer.Option(help="Default: the model that the vector was made with.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the queries as whole prompts, no template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 20,
) -> None:
    """Answer prompts from the command line with a saved task vector, and without it."""
    with plain_errors():
        loaded = engine.TaskVector.load(vector)
        lm = models.load(model or loaded.metadata["model"])
        loaded.check(lm)
        prompts = queries if raw else [tasks.Task.prompt([], query) for query in queries]
        options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, stop="\n")
        plain = engine.generate(lm, prompts, **options)
        patched = engine.generate(lm, prompts, heads=loaded.heads, values=loaded.values, **options)
        table = Table("query", "without", "with the vector", box=None)
        for row in zip(queries, plain, patched, strict=True):
            table.add_row(*(str(cell).strip() for cell in row))
        out.print(table)


@app.command()
def info(vector: Annotated[Path, typer.Argument(help="A vector.safetensors written by `extract`.")]) -> None:
    """Show what a saved task vector holds."""
    with plain_errors():
        loaded = engine.TaskVector.load(vector)
        table = Table(show_header=False, box=None)
        for key, value in loaded.metadata.items():
            if key != "losses":
                table.add_row(key, json.dumps(value) if isinstance(value, dict) else str(value))
        table.add_row("heads", f"{len(loaded.heads)}: " + ", ".join(f"{la}.{h}" for la, h in loaded.heads))
        out.print(table)


@contextmanager
def search_line(quiet: bool) -> Iterator[Callable[[mtv.Step], None]]:
    """A progress line with step, loss, heads on and rollouts a second."""
    shown = "{task.fields[said]}"
    columns = (TextColumn("search"), BarColumn(), TextColumn(shown), TimeElapsedColumn())
    with Progress(*columns, console=note, transient=True, disable=quiet) as progress:
        line = progress.add_task("search", total=None, said="")

        def on_step(step: mtv.Step) -> None:
            said = (
                f"step {step.step}/{step.steps}  loss {step.loss:.2f}  heads on {step.heads:.0f}  "
                f"{step.rollouts_per_second:.0f} rollouts/s"
            )
            progress.update(line, total=step.steps, completed=step.step, said=said)

        yield on_step


def score_table(task: str, scores: list[Score]) -> Table:
    """Accuracy and cost of each way to ask, prompt tokens saved beside the few-shot one."""
    few_shot = max(score.tokens for score in scores)
    table = Table(title=f"{task}: first-token accuracy on {scores[0].queries} held-out words")
    for column in ("", "accuracy", "95% interval", "tokens/query", "saved", "ms/query"):
        table.add_column(column, justify="right" if column else "left")
    for score in scores:
        saved = f"{1 - score.tokens / few_shot:.0%}" if score.tokens < few_shot else ""
        table.add_row(
            score.name,
            f"{score.accuracy:.2f}",
            f"{score.low:.2f}-{score.high:.2f}",
            f"{score.tokens:.1f}",
            saved,
            f"{1000 * score.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(app())
