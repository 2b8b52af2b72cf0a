"""A planted slowdown is found, equal samples show no difference, and too few of them are said to be too few."""

import pytest
from scipy.stats import mannwhitneyu

from bench.compare import compare, holm
from bench.records import Record

SAMPLES = [1.00, 1.02, 0.98, 1.01, 0.99, 1.03, 0.97, 1.04, 0.96]


def record(seconds, provider="packed", **other):
    return Record("rollouts", provider, "135m", 128, 32, "float32", "cpu", "huggingface", seconds=seconds, **other)


def test_a_planted_slowdown():
    (found,) = compare([record([1.5 * s for s in SAMPLES])], [record(SAMPLES)])
    assert found.verdict == "slower"
    assert found.ratio == pytest.approx(1.5)
    (found,) = compare([record(SAMPLES)], [record([1.5 * s for s in SAMPLES])])
    assert found.verdict == "faster"


def test_equal_samples():
    (found,) = compare([record(SAMPLES)], [record(SAMPLES[::-1])])
    assert (found.verdict, found.ratio) == ("no difference", 1.0)


def test_too_few_rounds_to_tell():
    (found,) = compare([record([2.0, 2.1, 2.2])], [record([1.0, 1.1, 1.2])])
    assert found.verdict == "too few rounds"
    assert found.ratio == pytest.approx(2.1 / 1.1)


def test_many_records_ask_for_more_evidence():
    """Five rounds without overlap are significant alone (p = 0.008), not among twenty."""
    slow, fast = [2.0, 2.1, 2.2, 2.3, 2.4], [1.0, 1.1, 1.2, 1.3, 1.4]
    assert mannwhitneyu(slow, fast).pvalue == pytest.approx(2 / 252)
    assert compare([record(slow)], [record(fast)])[0].verdict == "slower"
    names = [f"way {i}" for i in range(20)]
    found = compare([record(slow, n) for n in names], [record(fast, n) for n in names])
    assert {c.verdict for c in found} == {"too few rounds"}


def test_only_what_both_measured():
    old = [record(SAMPLES), record(SAMPLES, "naive"), record([], "hooks", status="wrong")]
    new = [record(SAMPLES), record(SAMPLES, "hooks"), record([], "naive", status="skipped")]
    assert [c.new.provider for c in compare(new, old)] == ["packed"]


def test_holm():
    """By hand: 4 x 0.01, 3 x 0.02, 2 x 0.03, 1 x 0.04, and never below the one before."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
