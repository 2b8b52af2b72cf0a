"""A prompt that begins with the beginning-of-text token, which the tokenizer adds as well, is warned of."""

import re
import warnings

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

import engine
import models
from bench.families import wrapped
from models import zoo

BOS = "~"  # of the tiny models' own characters
SAID = re.escape(f"begins with {BOS!r} twice") + ".*remove it from the text, or give token ids"


def adding(tokenizer, bos):
    """The tokenizer, putting the beginning-of-text token before every text."""
    special = [(bos, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return tokenizer


@pytest.fixture
def model():
    return models.wrap(zoo.tiny("llama"), adding(zoo.tiny_tokenizer(bos_token=BOS), BOS))


@pytest.fixture
def bos(model):
    return model.tokenizer.bos_token_id


VERBS = {
    "patch": engine.patch,
    "naive": engine.naive.patch,
    "generate": engine.generate,
    "prefill": engine.prefill,
    "capture": lambda model, prompt: engine.capture(model, [prompt]),
    "of several": lambda model, prompt: engine.patch(model, ["abc", prompt]),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_twice(model, verb):
    with pytest.warns(UserWarning, match=SAID):
        verb(model, f"{BOS}abc")


def test_the_ids_stay_as_the_tokenizer_gives_them(model, bos):
    with pytest.warns(UserWarning, match=SAID):
        ids = model.encode(f"{BOS}abc").tolist()
    assert ids == model.tokenizer(f"{BOS}abc")["input_ids"]
    assert ids[:2] == [bos, bos]
    with pytest.warns(UserWarning, match=SAID):
        assert model.encode(models.Prompt(f"{BOS}abc")).tolist() == ids


@pytest.mark.parametrize("text", ["abc", f"a{BOS}", f"{BOS}{BOS}a"], ids=["once", "inside", "twice in the text"])
def test_no_warning(model, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.prefill(model, text)


def test_no_warning_of_ids_and_of_tokenizers_that_add_none(model, bos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.patch(model, [bos, bos, 5, 6])
        plain = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(bos_token=BOS))
        assert engine.patch(plain, f"{BOS}abc").shape == (1, 97)
        assert torch.equal(engine.prefill(plain, f"{BOS}{BOS}a").tokens[:2], torch.tensor([bos, bos]))


def test_beside_an_image():
    seeing = wrapped("llava")
    tokenizer = seeing.processor.tokenizer
    tokenizer.bos_token = BOS
    adding(tokenizer, BOS)
    picture = Image.new("RGB", (28, 28))
    with pytest.warns(UserWarning, match=SAID):
        seeing.read(models.Prompt(f"{BOS}{models.IMAGE} abc", (picture,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seeing.read(models.Prompt(f"{models.IMAGE} abc", (picture,)))
