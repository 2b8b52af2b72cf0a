"""The command line: `headpatch extract` finds a task vector, `apply` answers with it; `fv` finds a function vector;
`trace` and `circuit` say which parts of a model carry an answer; `weights` composes finetuned models.
"""

from __future__ import annotations

try:
    import typer
except ImportError as error:
    raise SystemExit("the command line needs its extra: pip install 'headpatch[cli]'") from error

from engine.cli.asking import circuit, trace
from engine.cli.console import plain_errors
from engine.cli.experimenting import experiment
from engine.cli.extracting import extract
from engine.cli.vectors import apply, fv, info
from engine.cli.weighing import weights

__all__ = ["app", "plain_errors"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in (extract, fv, apply, info, trace, circuit, experiment, weights):
    app.command()(command)
