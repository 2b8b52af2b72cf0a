"""STV: what cannot be searched is refused before anything is run."""

import pytest
import torch

import engine
from engine import Example
from tests.refusal import EXAMPLES, refused

SHOWN = ["Q: up\nA: down\n\nQ: hot\nA:", "Q: up\nA: down\n\nQ: big\nA:"]


def extract(model, examples=EXAMPLES, contexts=SHOWN, **options):
    options = dict(heads=4, centroids=2, steps=2, rollouts=4, progress=False) | options
    return engine.stv.extract(model, examples, contexts, **options)


BAD = {
    "ranking": (dict(by="size"), ValueError, ("by must be one of", "'size'")),
    "no heads": (dict(heads=0), ValueError, ("between 1 and the 18", "got 0")),
    "too many heads": (dict(heads=19), ValueError, ("between 1 and the 18", "got 19")),
    "heads as text": (dict(heads="all"), ValueError, ("heads", "'all'")),
    "no centroids": (dict(centroids=0), ValueError, ("centroids", "the 2 contexts", "got 0")),
    "too many centroids": (dict(centroids=3), ValueError, ("centroids", "the 2 contexts", "got 3")),
    "one context": (dict(contexts=SHOWN[:1]), ValueError, ("one for each of 2 examples", "got 1")),
    "no contexts": (dict(contexts=[]), ValueError, ("contexts", "got 0")),
    "contexts as text": (dict(contexts=SHOWN[0]), TypeError, ("contexts must be a list",)),
    "empty context": (dict(contexts=["", SHOWN[0]]), ValueError, ("empty",)),
    "no examples": (dict(examples=[]), ValueError, ("no examples",)),
    "answer outside": (dict(examples=[Example("abc", 97), EXAMPLES[0]]), ValueError, ("97", "vocabulary")),
    "validation": (dict(validation=[Example("abc", "")]), ValueError, ("answer", "''")),
    "no steps": (dict(steps=0), ValueError, ("steps >= 1", "steps=0")),
    "one rollout": (dict(rollouts=1), ValueError, ("rollouts >= 2", "rollouts=1")),
    "lr": (dict(lr=-1.0), ValueError, ("lr > 0", "lr=-1.0")),
    "loss": (dict(loss="all"), ValueError, ("loss must be one of", "'all'")),
    "on_step": (dict(on_step=3), TypeError, ("on_step", "3")),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD.values(), ids=BAD)
def test_search(model, options, error, words):
    with refused(model, error, *words):
        extract(model, **options)


def test_sensitivity(model):
    with refused(model, ValueError, "contexts must be one for each of 2", "got 1"):
        engine.stv.sensitivity(model, SHOWN[:1], EXAMPLES)
    with refused(model, ValueError, "by must be one of", "'size'"):
        engine.stv.sensitivity(model, SHOWN, EXAMPLES, by="size")
    with refused(model, ValueError, "queries must be at least one prompt"):
        engine.stv.sensitivity(model, [], [])


def test_no_model():
    with pytest.raises(TypeError, match="model"):
        extract("smollm2-135m")


OTHERS = {
    "heads": (dict(heads=5), ("heads", "5")),
    "centroids": (dict(centroids=1), ("centroids",)),
    "contexts": (dict(contexts=SHOWN[::-1]), ("contexts",)),
    "seed": (dict(seed=1), ("seed",)),
}


@pytest.mark.parametrize(("options", "words"), OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_search(model, tmp_path, options, words):
    checkpoint = tmp_path / "search.safetensors"
    extract(model, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    with refused(model, ValueError, "another search", *words):
        extract(model, checkpoint=checkpoint, **options)
    with refused(model, ValueError, "of 2 steps, more than the 1"):
        extract(model, checkpoint=checkpoint, steps=1)
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_another_method(model, tmp_path):
    """MTV's and STV's are told apart."""
    checkpoint = tmp_path / "search.safetensors"
    extract(model, checkpoint=checkpoint)
    with refused(model, ValueError, "another search", "'method': 'stv'"):
        engine.mtv.extract(model, EXAMPLES, torch.zeros(3, 6, 8), steps=2, checkpoint=checkpoint, progress=False)
    checkpoint.unlink()
    engine.mtv.extract(model, EXAMPLES, torch.zeros(3, 6, 8), steps=2, checkpoint=checkpoint, progress=False)
    with refused(model, ValueError, "another search", "'method': 'mtv'"):
        extract(model, checkpoint=checkpoint)
