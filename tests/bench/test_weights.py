"""Loops and ours agree in what is timed."""

import sys

import pytest
import torch

from bench import weights


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
@pytest.mark.parametrize("rank", [0, 4])
def test_measure(monkeypatch, rank):
    monkeypatch.setattr(weights, "WIDTH", 24)
    monkeypatch.setattr(weights, "LAYERS", 2)
    result = weights.measure(tokens=3, samples=5, count=2, rank=rank, rounds=1)
    assert result["off the oracle, of the largest"] < 1e-5
    assert {"public loop / ours", "good loop / ours", "ours / plain forward"} <= result.keys()


@torch.no_grad()
def test_the_loops_compute_the_same(monkeypatch):
    monkeypatch.setattr(weights, "WIDTH", 24)
    model, x, vectors, c = weights.made(tokens=3, samples=4, count=2)
    apart = [{name: vectors.whole(name)[t] for name in vectors.shapes} for t in range(2)]
    want = weights.good_loop(model, x, vectors, c)
    torch.testing.assert_close(weights.public_loop(model, x, apart, c), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.weights.forward(model, x, vectors, c), want, atol=1e-5, rtol=1e-5)
