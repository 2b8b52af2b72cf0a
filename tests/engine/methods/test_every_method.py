"""What holds of every method that finds a vector: nothing is chosen by NaN; within no_grad and inference mode as
without; a checkpoint of other weights is not gone on with; pictures in half precision.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import models
from bench.families import wrapped
from engine import Example
from engine.tasks.scoring import with_answer
from models import zoo

ASKED = [Example(f"Q: {'ab' * n}\nA:", f" {letter}") for n, letter in enumerate("colder", start=1)]
QUERIES = [example.prompt for example in ASKED]
SHOWN = [f"Q: {letter}\nA: {letter}\n\n{example.prompt}" for letter, example in zip("qrstuv", ASKED, strict=True)]
BROKEN = [Example("Q: up\nA:", " x"), Example("Q: z\nA:", " x")]


def mtv(model, **options):
    return engine.mtv.extract(model, ASKED, torch.ones(3, 6, 8), **({"steps": 3, "progress": False} | options))


def by_gates(model, **options):
    return mtv(model, estimator="straight_through", **options)


def relaxed(model, **options):
    return mtv(model, estimator="relaxed", **options)


def stv(model, **options):
    options = dict(steps=3, heads=5, centroids=2, rollouts=4, progress=False) | options
    return engine.stv.extract(model, ASKED, SHOWN, **options)


def learned(model, **options):
    return engine.learned.extract(model, ASKED, [1], **({"steps": 3, "progress": False} | options))


SEARCHES = pytest.mark.parametrize("search", [mtv, by_gates, relaxed, stv, learned])


@pytest.fixture
def broken():
    """A prompt with a z in it is NaN."""
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="broken")
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[model.encode("z")[-1]] = torch.nan
    return model


@SEARCHES
@pytest.mark.filterwarnings("ignore:broken.*no way can be compared")
def test_losses_on_validation_examples_that_are_not_finite(broken, search):
    with pytest.raises(ValueError, match=r"validation: the loss of example 1 \('Q: z\\nA:'\) is not finite"):
        search(broken, validation=BROKEN)


@pytest.mark.filterwarnings("ignore:broken.*no way can be compared")
@pytest.mark.parametrize("where", ["contexts", "queries"])
def test_states_that_are_not_finite(broken, where):
    shown = [*SHOWN[:2], "z " + SHOWN[2]] if where == "contexts" else SHOWN[:3]
    asked = [*QUERIES[:2], "z " + QUERIES[2]] if where == "queries" else QUERIES[:3]
    said = r"broken gives NaN or infinite {} on prompt 2, 'z Q"
    for call, site in (
        (lambda: engine.stv.sensitivity(broken, shown, asked, progress=False), "z"),
        (
            lambda: engine.stv.extract(broken, ASKED[:3], ["z " + q for q in QUERIES[:3]], centroids=2, progress=False),
            "z",
        ),
        (lambda: engine.linear.extract(broken, shown, asked, layer=1, progress=False), "resid_post"),
        (lambda: engine.linear.extract(broken, shown, asked, progress=False), "resid_post"),
    ):
        with pytest.raises(ValueError, match=said.format(site).replace("prompt 2", r"prompt \d")):
            call()


@pytest.mark.filterwarnings("ignore:broken.*no way can be compared")
def test_a_distance_that_is_not_finite(broken):
    with pytest.raises(ValueError, match=r"broken gives NaN logits on 'Q: z"):
        engine.linear.distance(broken, ["Q: hot\nA:", "Q: z\nA:"], SHOWN[:2])


@SEARCHES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_within_no_grad_and_inference_mode(model, search, mode):
    """The same, bit by bit; what is given may have been made there."""
    want = search(model)
    with mode():
        got = search(model)
    assert got.metadata["losses"] == want.metadata["losses"]
    name = "vectors" if search is learned else "values"
    assert torch.equal(getattr(got, name), getattr(want, name))


@SEARCHES
def test_a_checkpoint_of_other_weights(tmp_path, search):
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="tiny")
    search(model, checkpoint=tmp_path / "kept")
    search(model, checkpoint=tmp_path / "kept", steps=4)
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"is of another search: it has \{'weights': '\w+'\}"):
        search(model, checkpoint=tmp_path / "kept", steps=5)


def seen(n):
    noise = np.random.default_rng(n).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    return models.Prompt(f"{models.IMAGE} which?\nA:", (Image.fromarray(noise),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_in_half_precision(dtype):
    model, shown = wrapped("llava", dtype), [seen(n) for n in range(3)]
    asked = [Example(prompt, " x") for prompt in shown]
    means = engine.mean_activations(model, shown, progress=False)
    found = engine.mtv.extract(model, asked, means, steps=2, progress=False)
    other = engine.stv.extract(model, asked, shown, centroids=2, steps=2, progress=False)
    assert found.values.isfinite().all()
    assert other.values.isfinite().all()


def test_whole_answers_to_pictures_pack():
    """And are those of naive: a prompt that is read at several tokens is compared as one that is read at its last."""
    model = wrapped("llava")
    means = engine.mean_activations(model, [seen(0), seen(1)], progress=False)
    heads = [(1, 1), (2, 3)]
    losses = engine.tasks.answer_losses(model, [seen(0), seen(1)], [[5, 6, 7]] * 2, heads=heads, values=means)
    for n in (0, 1):
        grown = with_answer(model, seen(n), [5, 6, 7])
        logits = engine.naive.patch(model, grown, heads=heads, values=means, positions=-3).view(3, -1)
        want = -logits.log_softmax(-1)[[0, 1, 2], [5, 6, 7]].sum()
        assert abs(losses[n, 0] - want) < 1e-5
    engine.patch(model, seen(0), heads=heads, values=means, strategy="packed")
