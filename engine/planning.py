"""From the sizes of a request to the fewest tokens that must be computed. Pure Python: no tensors, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from models import Shape, UnsupportedModelError

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


def make_plan(
    shape: Shape,
    n_tokens: int,
    n_rows: int,
    positions: Sequence[int],
    strategy: Strategy = "auto",
    n_ready: int = 0,
    packing_refused: str = "",
    sharing_refused: str = "",
    entry: Sequence[int] = (),
    layering_refused: str = "",
) -> Plan:
    """Choose how to run `n_rows` rows of a prompt, exactness first and cost second.

    positions:        patched positions, counted from the start of the prompt.
    n_ready:          tokens of the prompt whose keys and values are at hand.
    packing_refused:  why the model's rows cannot be packed exactly; empty if they can.
    sharing_refused:  why no prefix of this prompt can be shared exactly; empty if it can.
    entry:            the first patched layer of each row, if known: up to there it is the unpatched row.
    layering_refused: why rows cannot come in at that layer; empty if they can.

    Raises ValueError for an unknown strategy or no rows, UnsupportedModelError for one that is not exact on the model.

    >>> make_plan(Shape(30, 9, 3, 64, 576, 49152, 8192), n_tokens=512, n_rows=32, positions=[511]).n_computed
    543
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")
    if not isinstance(n_rows, int) or n_rows < 1:
        raise ValueError(f"rows must be a positive integer, got {n_rows!r}")
    refused = {
        "layered": sharing_refused or packing_refused or layering_refused,
        "packed": sharing_refused or packing_refused,
        "expanded": sharing_refused,
    }
    if refused.get(strategy):
        raise UnsupportedModelError(f"strategy {strategy!r} is not exact here: {refused[strategy]}")

    split = min(positions)
    tail = n_tokens - split
    whole, shared, ready = n_rows * n_tokens, split + n_rows * tail, min(n_ready, split)
    # One unpatched row, and of every other the layers it is in.
    layered = split + math.ceil(tail * (1 + sum(shape.n_layers - layer for layer in entry) / shape.n_layers))
    if strategy != "auto":
        reason = "asked for"
    elif sharing_refused:
        strategy, reason = "batch", f"nothing is shared: {sharing_refused}"
    elif n_rows * split <= 0.1 * whole:
        strategy, reason = "batch", f"rows share only {split} of {n_tokens} tokens"
    elif packing_refused:
        strategy, reason = "expanded", f"not packed: {packing_refused}"
    elif entry and not layering_refused and layered - ready <= LAYERED_FROM * (shared - ready):
        strategy, reason = "layered", f"rows differ only from token {split} and from their first patched layer on"
    else:
        strategy, reason = "packed", f"rows differ only from token {split} on"

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
