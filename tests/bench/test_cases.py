"""The hooks loop and the summaries of samples."""

import torch

import engine
from bench.hooks import patched_logits
from bench.timing import interleaved, ratio, summary


def test_the_hooks_loop_agrees_with_naive(model, draw):
    heads, values = draw(model, rows=3)
    ids = model.encode("Q: hot\nA:")
    got = torch.stack([patched_logits(model.hf, model.projections, ids, mask, values) for mask in heads])
    torch.testing.assert_close(got, engine.naive.patch(model, ids, heads=heads, values=values), atol=1e-5, rtol=0)


def test_summaries():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert summary([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert ratio([2.0, 8.0, 6.0], [1.0, 2.0, 2.0])["median"] == 3.0


def test_every_way_runs_in_every_round_between_waits():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved(ways, rounds=3, warm_up=1, wait=lambda: calls.append("wait"), progress=False)
    assert calls[:2] == ["a", "b"]
    rounds = [calls[i : i + 6] for i in range(2, 20, 6)]
    for one in rounds:
        assert one[0::3] == one[2::3] == ["wait", "wait"]
        assert sorted(one[1::3]) == ["a", "b"]
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 3, "b": 3}
