"""Copies of a model compute the same; a prefix stays with its model; a model that returns tuples is patched too."""

import copy
import pickle

import pytest
import torch

import engine
import models
from models import zoo

PROMPT = [5, 6, 7, 8, 9]


def wrap(family="llama"):
    return models.wrap(zoo.tiny(family), zoo.tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_copied_model(family, draw):
    model = wrap(family)
    heads, values = draw(model, rows=3)
    want = engine.patch(model, PROMPT, heads=heads, values=values)
    made = copy.deepcopy(model)
    assert made.hf is not model.hf
    assert torch.equal(engine.patch(made, PROMPT, heads=heads, values=values), want)
    with torch.no_grad():
        made.hf.get_input_embeddings().weight.zero_()
    assert torch.equal(engine.patch(model, PROMPT, heads=heads, values=values), want)


def test_a_copied_prefix_is_the_prefix():
    prefix = engine.prefill(wrap(), PROMPT)
    assert copy.deepcopy(prefix) is prefix
    assert copy.copy(prefix) is prefix


def test_a_prefix_is_not_pickled():
    prefix = engine.prefill(wrap(), PROMPT)
    with pytest.raises(TypeError, match=r"a prefix belongs to its model.*prefill again"):
        pickle.dumps(prefix)


@pytest.mark.parametrize("strategy", ["auto", "layered", "packed", "expanded", "batch", "naive"])
def test_a_model_that_returns_tuples(strategy, draw):
    hf = zoo.tiny("llama")
    model = models.wrap(hf)
    heads, values = draw(model, rows=3)
    want = engine.patch(models.wrap(zoo.tiny("llama")), PROMPT, heads=heads, values=values, strategy="naive")
    hf.config.return_dict = False
    logits = engine.patch(model, PROMPT, heads=heads, values=values, strategy=strategy)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
    assert hf.config.return_dict is False


def test_other_verbs_on_a_model_that_returns_tuples(draw):
    model, tuples = wrap(), wrap()
    tuples.hf.config.return_dict = False
    heads, values = draw(model, rows=2)
    steered = engine.Patch("resid_post", [1], torch.arange(48.0) / 48, mode="add")
    torch.testing.assert_close(engine.capture(tuples, [PROMPT]), engine.capture(model, [PROMPT]))
    found, want = (engine.patch(m, PROMPT, steered) for m in (tuples, model))
    torch.testing.assert_close(found, want)
    answers = [engine.generate(m, PROMPT, heads=heads, values=values) for m in (tuples, model)]
    assert answers[0] == answers[1]
    found, want = (engine.patch(m, engine.prefill(m, PROMPT), heads=heads, values=values) for m in (tuples, model))
    torch.testing.assert_close(found, want)
