"""The benchmark of contrasts: a record a task and seed, a line a task."""

import pytest

from bench import contrasts
from engine import tasks


def test_records(smollm2):
    records = contrasts.measure(smollm2, ["agreement", "facts"], count=3, seeds=2)
    assert [(record["task"], record["seed"]) for record in records] == [
        (name, seed) for name in ("agreement", "facts") for seed in (0, 1)
    ]
    pairs = tasks.contrast("facts", smollm2, count=3, seed=1)
    clean, corrupted = pairs.differences(smollm2)
    assert records[-1]["clean"] == pytest.approx(clean.mean().item(), abs=1e-3)
    assert records[-1]["corrupted"] == pytest.approx(corrupted.mean().item(), abs=1e-3)
    assert records[-1]["clean above 0"] == pytest.approx((clean > 0).float().mean().item())
    lines = contrasts.markdown(records).splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == 7 for line in lines)
