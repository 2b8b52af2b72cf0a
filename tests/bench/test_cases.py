"""Benchmarks measure what they say: on a tiny model, every way agrees before it is timed."""

import json

import pytest
import torch
from typer.testing import CliRunner

import engine
from bench import rollouts
from bench.__main__ import app
from bench.hooks import patched_logits
from bench.timing import ratio, summary


def test_the_hooks_loop_agrees_with_naive(model, draw):
    heads, values = draw(model, rows=3)
    ids = model.encode("Q: hot\nA:")
    got = torch.stack([patched_logits(model.hf, model.projections, ids, mask, values) for mask in heads])
    torch.testing.assert_close(got, engine.naive.patch(model, ids, heads=heads, values=values), atol=1e-5, rtol=0)


def test_rollouts(model):
    result = rollouts.measure(model, tokens=9, rows=4, rounds=2, naive_rows=2)
    assert result["floor of fresh / one forward"] == 12 / 9
    assert set(result["seconds"]) == {"hooks", "naive", "one stock forward", "one forward", "fresh", "reused"}
    json.dumps(result)


def test_a_wrong_way_is_not_timed(model, monkeypatch):
    monkeypatch.setattr(rollouts, "patched_logits", lambda *_: torch.zeros(97))
    with pytest.raises(RuntimeError, match="hooks"):
        rollouts.measure(model, tokens=9, rows=4, rounds=1, naive_rows=2)


def test_summaries():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert summary([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert ratio([2.0, 8.0, 6.0], [1.0, 2.0, 2.0])["median"] == 3.0


def test_help_lists_the_cases():
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(case in shown for case in ("rollouts", "search", "memory", "exactness"))
