"""From the sizes of a request to the fewest tokens that must be computed. Pure Python: no tensors, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from models import Capabilities, Shape, Site, UnsupportedModelError
from models.reading import read_int

Strategy: TypeAlias = Literal["auto", "layered", "packed", "expanded", "batch", "naive"]

# Limits of one forward. They bound memory, not results: more rows take several forwards over the same prefix.
MAX_TOKENS = 4096
MAX_SCORE_BYTES = 256 * 2**20
# Rows come in layer by layer where that saves a fifth of the tokens: prompts with few rows rather share a forward.
LAYERED_FROM = 0.8


@dataclass(frozen=True)
class Plan:
    """How the rows of one prompt are run. `print(plan)` says what was chosen and why.

    strategy:      "layered", "packed", "expanded", "batch" or "naive".
    split:         tokens before it are the same in every row: the prefix.
    rows_per_pass: rows that one forward takes.
    n_computed:    tokens that all forwards together compute.
    """

    strategy: Strategy
    n_tokens: int
    n_rows: int
    split: int
    rows_per_pass: int
    n_computed: int
    reason: str

    @property
    def n_naive(self) -> int:
        """Tokens that one full forward a row computes."""
        return self.n_rows * self.n_tokens

    def __str__(self) -> str:
        passes = -(-self.n_rows // self.rows_per_pass)
        return (
            f"{self.strategy}: {self.n_rows} rows of {self.n_tokens} tokens, {self.split} of them shared; "
            f"{self.n_computed} tokens computed in {passes} pass{'es' if passes > 1 else ''} "
            f"(naive: {self.n_naive}); {self.reason}"
        )


@dataclass(frozen=True)
class Request:
    """What a plan must know of one prompt and its rows.

    positions: patched positions, counted from the start of the prompt.
    n_ready:   tokens of the prompt whose keys and values are at hand.
    entry:     the first patched layer of each row, if known: up to there it is the unpatched row.
    unsplit:   why rows of this prompt cannot begin where they are first patched; empty if they can.
    sites:     where rows are patched.
    """

    n_tokens: int
    n_rows: int
    positions: Sequence[int]
    n_ready: int = 0
    entry: Sequence[int] = ()
    unsplit: str = ""
    sites: frozenset[Site] = frozenset()

    def why_not(self, way: str, can: Capabilities) -> str:
        """Why these rows are not exact this way; empty if they are."""
        unsplit = self.unsplit if way in ("layered", "packed", "expanded") else ""
        return unsplit or can.why_not(way, self.n_tokens, self.sites)


def make_plan(shape: Shape, can: Capabilities, asked: Request, strategy: Strategy = "auto") -> Plan:
    """Choose how to run rows of a prompt on a model that can do what `can` says: exactness first, cost second.

    Raises ValueError for an unknown strategy or no rows, UnsupportedModelError for one that is not exact on the model.

    >>> asked = Request(n_tokens=512, n_rows=32, positions=[511])
    >>> make_plan(Shape(30, 9, 3, 64, 576, 49152, 8192), models.Capabilities(), asked).n_computed
    543
    """
    n_tokens, n_rows = asked.n_tokens, asked.n_rows
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")
    n_rows = read_int(n_rows, "rows")
    if refused := asked.why_not(strategy, can):
        raise UnsupportedModelError(f"strategy {strategy!r} is not exact here: {refused}")

    split = min(asked.positions)
    tail = n_tokens - split
    whole, shared, ready = n_rows * n_tokens, split + n_rows * tail, min(asked.n_ready, split)
    # One unpatched row, and of every other the layers it is in.
    layered = split + math.ceil(tail * (1 + sum(shape.n_layers - layer for layer in asked.entry) / shape.n_layers))
    not_packed, not_expanded = (asked.why_not(way, can) for way in ("packed", "expanded"))
    least = min(shared - ready, whole)
    late = asked.entry and not asked.why_not("layered", can) and layered - ready <= LAYERED_FROM * least
    if strategy != "auto":
        reason = "asked for"
    elif not_packed and not_expanded:
        strategy, reason = "batch", f"nothing is shared: {not_packed}"
    elif n_rows * split <= 0.1 * whole and not late:
        strategy, reason = "batch", f"rows share only {split} of {n_tokens} tokens"
    elif not_packed:
        strategy, reason = "expanded", f"not packed: {not_packed}"
    elif late:
        strategy, reason = "layered", f"rows differ only from token {split} and from their first patched layer on"
    else:
        strategy, reason = "packed", f"rows differ only from token {split} on"
    if strategy == "batch" and can.batch:  # not asked for
        strategy, reason = "naive", f"not batched: {can.batch}; {reason}"

    if strategy == "naive":
        return Plan(strategy, n_tokens, n_rows, 0, 1, whole, reason)
    if strategy == "batch":
        return Plan(strategy, n_tokens, n_rows, 0, _at_most(n_rows, MAX_TOKENS // n_tokens), whole, reason)
    rows_per_pass = MAX_TOKENS // tail
    if strategy in ("layered", "packed"):  # fp32 scores of one row against prefix and itself
        rows_per_pass = min(rows_per_pass, MAX_SCORE_BYTES // (4 * shape.n_heads * tail * n_tokens))
    computed = (layered if strategy == "layered" else shared) - ready
    return Plan(strategy, n_tokens, n_rows, split, _at_most(n_rows, rows_per_pass), computed, reason)


def _at_most(n_rows: int, limit: int) -> int:
    return max(1, min(n_rows, limit))
