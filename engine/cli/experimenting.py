"""`headpatch experiment`: the paper's experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import models
from engine import tasks
from engine.cli import console
from engine.cli.console import Quiet, note, out
from engine.experiments import DATA_SETS, EXPERIMENTS, Options, default_shots, run


def experiment(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    model: Annotated[str, typer.Option(help="smollm2-eyes, smollm2-135m, a local folder, or a hub id.")] = (
        "smollm2-eyes"
    ),
    task: Annotated[
        list[str] | None, typer.Option(help="May be repeated; default easy_vqa_colour and easy_vqa_shape.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of a data set that is not packaged, in its official layout.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Of the split, the prompts and the search: 0, 1, ...")] = 5,
    shots: Annotated[
        int | None, typer.Option(help="Demonstrations; default 8, 4 for vizwiz and okvqa, 0 for 2-way tasks.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Prompts behind the means, and examples to search on.")] = 100,
    steps: Annotated[int, typer.Option(help="Of a search.")] = 100,
    queries: Annotated[int, typer.Option(help="Held-out questions asked, as far as there are.")] = 100,
    folder: Annotated[Path | None, typer.Option("--out", help="Where results go; default out/NAME.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """An experiment of the MTV paper: its table, pictures, every seed's scores, and a page to look at.

    A run that is stopped goes on where it was. vizwiz, okvqa, flowers and cub are `main` on that data set, with --data.
    """
    with console.plain_errors():
        if name not in EXPERIMENTS:
            raise ValueError(f"no experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}")
        if name in DATA_SETS and (task or data is None):
            raise ValueError(f"experiment {name!r} is on its own data: expected --data FOLDER, and no --task")
        names = [name] if name in DATA_SETS else task or ["easy_vqa_colour", "easy_vqa_shape"]
        opened = [tasks.load(one, data) for one in names]
        shots = default_shots(name, opened) if shots is None else shots
        options = Options(seeds, shots, examples, steps, queries)
        folder = Path("out") / name if folder is None else folder
        console.make_folder(folder)
        results = run(
            name, lambda: models.load(model, device=device), opened, options, folder=folder, progress=not quiet,
            say=None if quiet else lambda line: note.print(line, highlight=False, soft_wrap=True),
        )  # fmt: skip
        rows = results.rows()
        table = Table(title=f"{name}, {results.model}, {seeds} seed{'s' if seeds > 1 else ''}")
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        out.print(table)
        console.list_files(folder, ["report.html"])
