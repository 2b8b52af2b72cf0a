"""What cannot be handed over is refused before anything runs; what goes on in another way than asked, when it does."""

import copy
import pickle

import pytest
import torch
import transformers

import engine
import models
from models import zoo
from tests.engine.core.test_bad_input import BAD_HEADS, BAD_PROMPTS, BAD_VALUES
from tests.refusal import MASK, VALUES, refused

IDS = list(range(1, 12))
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=3)


@pytest.mark.parametrize(("heads", "error", "words"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_heads(model, heads, error, words):
    with refused(model, error, *words):
        engine.start(model, IDS, heads=heads, values=VALUES)


@pytest.mark.parametrize(("values", "error", "words"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_values(model, values, error, words):
    with refused(model, error, *words):
        engine.start(model, IDS, heads=MASK, values=values)


@pytest.mark.parametrize(("prompt", "error", "words"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_prompt(model, prompt, error, words):
    with refused(model, error, *words):
        engine.start(model, prompt, heads=MASK, values=VALUES)


def test_several_prompts(model):
    with refused(model, ValueError, "one prompt", "list of 2"):
        engine.start(model, ["abc", "de"])


@pytest.mark.parametrize("copies", [0, -1, 1.5, "2", None, True])
def test_copies(model, copies):
    with refused(model, ValueError, "copies", repr(copies)):
        engine.start(model, IDS, copies=copies)


@pytest.mark.parametrize(
    ("patched", "error", "said"),
    [
        ("some", ValueError, "'some'"),
        (-1, ValueError, "-1"),
        ([0, -2], ValueError, "-2"),
        ([], TypeError, "[]"),
        (1.5, TypeError, "1.5"),
        (None, TypeError, "None"),
    ],
)
def test_patched(model, patched, error, said):
    with refused(model, error, said):
        engine.start(model, IDS, patched=patched)


def test_no_room_for_an_answer(model):
    with refused(model, models.UnsupportedModelError, "128 tokens", "context"):
        engine.start(model, [5] * 128)


def test_models_that_were_not_wrapped():
    with pytest.raises(TypeError, match="wrap"):
        engine.start(zoo.tiny("llama"), IDS)


def test_encoders():
    model = models.wrap(zoo.tiny("bert"), zoo.tiny_tokenizer())
    with refused(model, models.UnsupportedModelError, "encoder"):
        engine.start(model, IDS)


def altered(how):
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="altered")
    how(model)
    return model


REFUSED = {
    "past of its own": (lambda m: setattr(m.hf, "_supports_default_dynamic_cache", lambda: False), "its own"),
    "no cache": (lambda m: setattr(m, "_accepts", frozenset({"input_ids"})), "its own"),
    "no generate": (lambda m: setattr(m.hf, "can_generate", lambda: False), "no generate"),
    "compiled": (lambda m: setattr(m.hf.model.layers[1], "_compiled_call_impl", len), "compiled"),
    "int8": (lambda m: setattr(m, "_ruled_of", lambda _: models.Capabilities(*["scales"] * 4)), "2 rows", "scales"),
    "longest": (lambda m: setattr(m, "_ruled_of", lambda _: models.Capabilities(longest=9, longer="rotary")), "rotary"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models(what):
    how, *words = REFUSED[what]
    model = altered(how)
    with refused(model, models.UnsupportedModelError, "altered", *words):
        engine.start(model, IDS, heads=MASK, values=VALUES)


def test_steering_without_blocks(model):
    paths = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.2.self_attn.o_proj"]
    found = models.wrap(model.hf, projections=paths)
    body = found.body
    object.__setattr__(body, "blocks", [])
    with refused(found, models.UnsupportedModelError, "blocks"):
        engine.start(found, IDS, engine.Patch("resid_post", [1], torch.zeros(model.shape.d_model), mode="add"))


@pytest.mark.parametrize(("copies", "options", "right"), [(1, dict(num_beams=3), "copies=3"), (2, {}, "copies=1")])
def test_other_copies_than_generate_makes(model, copies, options, right):
    """Said before the forward; the start is as good as before."""
    start = engine.start(model, IDS, heads=MASK, values=VALUES, copies=copies)
    with pytest.raises(ValueError, match=rf"2 \* {copies} copies were handed over: .*{right}"):
        model.hf.generate(**start, **GREEDY, **options)
    fitting = dict(num_return_sequences=copies, do_sample=True) if copies > 1 else {}
    assert len(model.hf.generate(**start, **GREEDY | fitting)) == 2 * copies


def test_gone_on_from_twice(model):
    start = engine.start(model, IDS, heads=MASK, values=VALUES)
    other = copy.deepcopy(start)
    model.hf.generate(**start, **GREEDY)
    with refused(model, ValueError, "gone on from", "13 tokens", "had 10", "deepcopy"):
        model.hf.generate(**start, **GREEDY)
    model.hf.generate(**other, **GREEDY)


def test_changed_meanwhile():
    model = models.wrap(zoo.tiny("llama"), name="changed")
    start = engine.start(model, IDS)
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="changed has changed"):
        model.hf.generate(**start, **GREEDY)


def test_beyond_the_context(model):
    start = engine.start(model, [5] * 120, heads=MASK, values=VALUES)
    with pytest.raises(ValueError, match="exceed the 128 tokens"):
        model.hf.generate(**start, **GREEDY | dict(max_new_tokens=9))
    start = engine.start(model, [5] * 120, heads=MASK, values=VALUES)
    assert model.hf.generate(**start, **GREEDY | dict(max_new_tokens=8)).shape == (2, 128)


def test_use_cache_is_the_starts_own(model):
    start = engine.start(model, IDS)
    with refused(model, TypeError, "use_cache"):
        model.hf.generate(**start, **GREEDY, use_cache=False)
    config = transformers.GenerationConfig(use_cache=False, max_new_tokens=3, do_sample=False)
    assert model.hf.generate(**start, generation_config=config).shape == (1, 14)


def test_caches_are_not_pickled(model):
    start = engine.start(model, IDS)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(start["past_key_values"])
