"""A planted slowdown is found, equal samples show no difference, and too few of them are said to be too few."""

import pytest
from scipy.stats import mannwhitneyu

from bench.compare import compare, holm, rounds_needed
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


def test_a_machine_that_is_slower_as_a_whole_leaves_what_stands_beside_stock():
    old, new = ({"one stock forward": {"median": 1.5, "low": 1.4, "high": 1.6}} for _ in range(2))
    (found,) = compare([record([2 * s for s in SAMPLES], cost=new)], [record(SAMPLES, cost=old)])
    assert (found.ratio, found.beside) == (pytest.approx(2), 1)


def test_rounds_that_show_a_difference():
    """The hint is right: so many rounds without overlap are significant among so many records, one less are not."""
    for records in (1, 20):
        names = [f"way {i}" for i in range(records)]
        for rounds, verdict in ((rounds_needed(records), "slower"), (rounds_needed(records) - 1, "too few rounds")):
            slow, fast = [[start + 0.01 * i for i in range(rounds)] for start in (2.0, 1.0)]
            found = compare([record(slow, n) for n in names], [record(fast, n) for n in names])
            assert {c.verdict for c in found} == {verdict}


def test_holm():
    """By hand: 4 x 0.01, 3 x 0.02, 2 x 0.03, 1 x 0.04, and never below the one before."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
