"""`headpatch weights`: task vectors of weights, composed in every way, on packaged sets."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from engine.cli import console
from engine.cli.console import Quiet, note, out
from engine.experiments.composition import DEFAULTS, WAYS, run


def weights(
    kind: Annotated[str, typer.Argument(help="images or texts.")] = "images",
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="May be repeated; default all pictures; films, tweets, glosses (also: products, news)."
        ),
    ] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"May be repeated; default all: {', '.join(WAYS)}.")] = None,
    negation: Annotated[bool, typer.Option(help="Also make the base forget each set.")] = True,
    seeds: Annotated[int | None, typer.Option(help="Of splits, training and fits; default 3.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of each set at most, in all parts.")] = None,
    epochs: Annotated[int | None, typer.Option(help="In which coefficients are learned.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Where results go; default out/weights-KIND.")] = None,
    quiet: Quiet = False,
) -> None:
    """Compose task vectors of weights, for all or for each sample (VTVC), and compare with eight other ways.

    Trains what it needs: a small vision transformer on six packaged sets of pictures, or MiniLM on three of sentences.
    A run that is stopped goes on where it was.
    """
    with console.plain_errors():
        if kind not in DEFAULTS:
            raise ValueError(f"no kind {kind!r}: expected one of {', '.join(DEFAULTS)}")
        given: dict[str, Any] = {"seeds": seeds, "samples": samples, "epochs": epochs}
        options = replace(DEFAULTS[kind], **{name: n for name, n in given.items() if n is not None})
        folder = Path("out") / f"weights-{kind}" if folder is None else folder
        console.make_folder(folder)
        results = run(
            kind, options, folder=folder, names=sets or (), ways_asked=way or WAYS, negation=negation,  # type: ignore[arg-type]
            progress=not quiet, say=None if quiet else lambda line: note.print(line, highlight=False, soft_wrap=True),
        )  # fmt: skip
        for title, rows in (("task addition", results.rows()), ("task negation", results.negation_rows())):
            if rows:
                table = Table(title=f"{title}, {kind}, {asdict(options)['seeds']} seed(s)")
                columns = [column for column in rows[0] if column not in results.addition[0]["right"]]
                for column in columns:
                    table.add_column(column, overflow="fold")
                for row in rows:
                    table.add_row(*(row[column] for column in columns))
                out.print(table)
        console.list_files(folder, ["results.json", "scores.png"])
