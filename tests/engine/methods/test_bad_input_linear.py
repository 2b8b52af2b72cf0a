"""Linear task vectors: what cannot be fitted is refused before anything is run; broken files."""

import numpy as np
import pytest
import torch

import engine
from engine.methods.linear import LinearVector, regress
from tests.refusal import refused

ASKED = ["Q: hot\nA:", "Q: big\nA:", "Q: up\nA:"]
SHOWN = [f"Q: old\nA: new\n\n{one}" for one in ASKED]

BAD = {
    "one context": (dict(contexts=SHOWN[:1]), ValueError, ("one for each of 3", "got 1")),
    "queries as text": (dict(queries=ASKED[0]), TypeError, ("queries must be a list",)),
    "none": (dict(contexts=[], queries=[]), ValueError, ("queries", "got 0")),
    "two": (dict(contexts=SHOWN[:2], queries=ASKED[:2]), ValueError, ("at least 3 questions", "got 2")),
    "one": (dict(contexts=SHOWN[:1], queries=ASKED[:1], layer=1), ValueError, ("at least 2 questions", "got 1")),
    "layer": (dict(layer=3), ValueError, ("between 0 and 2", "got 3")),
    "negative layer": (dict(layer=-1), ValueError, ("between 0 and 2", "got -1")),
    "layer as text": (dict(layer="last"), ValueError, ("layer", "'last'")),
    "ridge": (dict(ridge=0.0), ValueError, ("positive", "0.0")),
    "ridge as text": (dict(ridge="auto"), ValueError, ("positive", "'auto'")),
    "empty": (dict(queries=["", *ASKED[1:]]), ValueError, ("empty",)),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD.values(), ids=BAD)
def test_extract(model, options, error, words):
    options = dict(contexts=SHOWN, queries=ASKED, progress=False) | options
    with refused(model, error, *words):
        engine.linear.extract(model, **options)


def test_distance(model):
    with refused(model, ValueError, "contexts must be one for each of 3"):
        engine.linear.distance(model, ASKED, SHOWN[:2])
    with refused(model, ValueError, "[3, 6, 8]"):
        engine.linear.distance(model, ASKED, SHOWN, heads=[(0, 0)], values=torch.zeros(3, 6, 7))


def test_files(model, tiny, tmp_path):
    path = tmp_path / "linear.safetensors"
    vector = LinearVector(1, *regress(*torch.randn(2, 4, 48), 1.0), {"model": model.name})
    vector.save(path)
    LinearVector.load(path, model)
    with refused(tiny("mistral"), ValueError, "tiny-llama", "tiny-mistral", "layer 1"):
        LinearVector.load(path, tiny("mistral"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        LinearVector.load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        LinearVector.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.ones(3, 2), torch.ones(4, 2)),
        (torch.ones(3), torch.ones(3)),
        (torch.ones(0, 2), torch.ones(0, 2)),
        (torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 1)),
        (np.ones((2, 1)), np.array([[1.0], [np.inf]])),
    ],
)
def test_regress(x, y):
    with pytest.raises(ValueError, match=r"x and y must be finite numbers \[questions, width\], got "):
        regress(x, y)


def test_regress_takes_numpy():
    x = np.random.default_rng(0).normal(size=(5, 3))
    for got, want in zip(regress(x, 2 * x), regress(torch.tensor(x), torch.tensor(2 * x)), strict=True):
        assert torch.equal(got, want)
