"""Two runs, record by record: is it faster, slower, or can no difference be shown?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import comb
from statistics import median

from bench.records import Record

ALPHA = 0.05  # chance that any of all verdicts is wrong where nothing changed (Holm)


@dataclass(frozen=True)
class Comparison:
    """ratio: new median over old. p: Mann-Whitney, two-sided, corrected by Holm over all records compared.

    beside: the ratio over that of the stock forward, which ran in the same rounds: a machine that has become slower
            as a whole leaves it at 1.
    """

    new: Record
    old: Record
    ratio: float
    beside: float
    p: float
    verdict: str


def compare(new: Sequence[Record], old: Sequence[Record]) -> list[Comparison]:
    """Of the records that both measured, matched by their key.

    "too few rounds": not even samples without overlap would be significant among so many records.
    """
    from scipy.stats import mannwhitneyu

    before = {record.key: record for record in old if record.seconds}
    pairs = [(record, before[record.key]) for record in new if record.seconds and record.key in before]
    # Samples without any overlap would have these p-values; a record for which even that shows nothing is not tested.
    least = [2 / comb(len(a.seconds) + len(b.seconds), len(a.seconds)) for a, b in pairs]
    tested = [i for i, p in enumerate(least) if p < ALPHA]
    raw = [float(mannwhitneyu(pairs[i][0].seconds, pairs[i][1].seconds).pvalue) for i in tested]
    corrected = dict(zip(tested, holm(raw), strict=True))
    found = []
    for i, (a, b) in enumerate(pairs):
        ratio, p = median(a.seconds) / median(b.seconds), corrected.get(i, 1.0)
        if p < ALPHA:
            verdict = "slower" if ratio > 1 else "faster"
        else:
            verdict = "no difference" if least[i] * len(tested) < ALPHA and i in corrected else "too few rounds"
        beside = _over_stock(a) / _over_stock(b)
        found.append(Comparison(a, b, ratio, beside, p, verdict))
    return found


def rounds_needed(records: int) -> int:
    """The fewest rounds, in both runs, with which a difference among so many records can be shown.

    >>> rounds_needed(1), rounds_needed(100)
    (4, 8)
    """
    return next(n for n in count(1) if 2 / comb(2 * n, n) * records < ALPHA)


def _over_stock(record: Record) -> float:
    return record.cost.get("one stock forward", {}).get("median", float("nan"))


def holm(p: Sequence[float]) -> list[float]:
    """Corrected p-values: the i-th smallest of m times (m - i + 1), never below a smaller one's."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = worst
    return corrected
