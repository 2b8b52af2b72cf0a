"""The sweep benchmark on a tiny model: it counts what it says it counts, and its ways agree."""

import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from bench import sweeps
from bench.limits import Sizes
from models import zoo
from tests.conftest import engine


@pytest.fixture(scope="module")
def result(model):
    return sweeps.measure(model, shots=2, prompts=3, rounds=2)


def test_the_ways_agree(result):
    sweep = result["sweep"]
    assert sweep["forwards of the loop"] == 3 * (1 + 18)
    assert sweep["hooks - sweep, probability"] < 1e-5
    assert sweep["naive - sweep, probability"] < 1e-5
    assert result["layered"]["largest logit difference"] < 1e-5
    assert result["layered"]["rows"] == 18


def test_attribution_is_compared_with_the_sweep(result):
    found = result["attribution"]
    assert 0 < found["1 steps, Spearman"] <= 1
    assert -1 <= found["10 steps, Spearman"] <= 1
    assert 0 <= found["1 steps, of the ten strongest heads"] <= 10


def test_times_are_positive_and_finite(result):
    seconds = [x for part in ("sweep", "layered", "attribution") for key, x in result[part].items() if "seconds" in key]
    assert len(seconds) == 3 + 4 + 2
    assert all(0 < x < math.inf for x in seconds)


def test_a_loop_that_computes_something_else_is_seen(model, monkeypatch):
    monkeypatch.setattr(sweeps, "patched_logits", lambda *_: torch.zeros(97))
    found = sweeps.measure(model, shots=1, prompts=2, rounds=1)
    assert found["sweep"]["hooks - sweep, probability"] > 1e-3


def test_counted_work():
    """Against a count over rows and layers, one by one."""
    sizes = Sizes.of(zoo.tiny("llama"))
    tokens, layers, heads = 9, 3, 6
    block = 2 * sizes.blocks / layers + 4 * sizes.q_width * tokens  # of one token that sees nine
    passed = [layers] + [layers - layer for layer in range(layers) for _ in range(heads)]
    vocabulary = 18 * 2 * sizes.vocabulary
    assert sweeps.rows(sizes, tokens, 18, False, False) == pytest.approx(18 * layers * block + vocabulary)
    assert sweeps.rows(sizes, tokens, 18, True, False) == pytest.approx(sum(passed) * block + vocabulary)
    assert sweeps.rows(sizes, tokens, 18, True, True) > sweeps.rows(sizes, tokens, 18, True, False)
    whole = sum(2 * sizes.blocks + 4 * layers * sizes.q_width * seen for seen in range(1, tokens + 1))
    assert sweeps.full_forward(sizes, tokens) == pytest.approx(whole + 2 * sizes.vocabulary)


def test_single_heads(model):
    heads = sweeps.single_heads(model)
    assert heads.shape == (18, 3, 6)
    assert (heads.sum(dim=(1, 2)) == 1).all()
    assert heads.any(dim=0).all()
    logits = engine.patch(model, [5, 6], heads=heads, values=torch.zeros(3, 6, 8))
    assert logits.shape == (18, 97)


def test_table_and_json(result):
    text = StringIO()
    Console(width=120, file=text).print(sweeps.table(result))
    for part in ("sweep", "layered", "attribution"):
        assert all(key in text.getvalue() for key in result[part])
    json.dumps(result)
