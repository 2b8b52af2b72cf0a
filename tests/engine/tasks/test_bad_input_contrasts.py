"""Contrasts that there are not are refused before any compute: what was given, and what there is."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import models
from engine import tasks
from models import zoo


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    monkeypatch.setattr(tasks.contrasts, "patch", lambda *_, **__: pytest.fail("the model ran"))


@pytest.mark.parametrize("name", ["IOI", "", None, 3, ["ioi"], np.array(["ioi", "facts"])])
def test_unknown(model, name):
    with pytest.raises(ValueError, match=r"no contrast .*: expected one of ioi, .*, facts"):
        tasks.contrast(name, model)


def test_models():
    hf = zoo.tiny("llama")
    with pytest.raises(TypeError, match="wrap it"):
        tasks.contrast("ioi", hf)
    with pytest.raises(ValueError, match="bare was wrapped without a tokenizer"):
        tasks.contrast("ioi", models.wrap(hf, name="bare"))


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
def test_count(model, count):
    with pytest.raises(ValueError, match="count must be a positive integer"):
        tasks.contrast("greater_than", model, count=count)


@pytest.mark.parametrize("seed", [0.5, None, "0", 2**64])
def test_seed(model, seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        tasks.contrast("greater_than", model, seed=seed)


def test_more_than_there_are(smollm2):
    with pytest.raises(ValueError, match=r"facts has \d+ pairs that smollm2-135m's tokenizer aligns, got count=1000"):
        tasks.contrast("facts", smollm2, count=1000)
    with pytest.raises(ValueError, match=r"facts has \d+ pairs of one length .* got count=1000"):
        tasks.contrast("facts", smollm2, count=1000, same_length=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ioi", r"5 names of one token, the tokenizer has 0 of \d\d"),
        ("ioi_flipped", "5 names of one token"),
        ("agreement", r"2 nouns of one token in both numbers, the tokenizer has 0 of \d\d"),
        ("facts", "facts has 0 pairs that tiny-llama's tokenizer aligns"),
    ],
)
def test_a_token_a_character(model, name, said):
    """Words are no tokens there. Digits are."""
    with pytest.raises(ValueError, match=said):
        tasks.contrast(name, model)
    assert tasks.contrast("greater_than", model, count=3).others[0].isdecimal()


@pytest.mark.parametrize("digits", [r"\d{1,3}", r"\d+"])
def test_years_that_are_cut_elsewhere(digits):
    """17|32 is not what the tokenizer makes of it: no answer would follow the prompt."""
    backend = Tokenizer(WordLevel({str(n): n for n in range(96)} | {"<unk>": 96}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{digits}| ?[A-Za-z]+| "), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(ValueError, match="one or two tokens"):
        tasks.contrast("greater_than", models.wrap(zoo.tiny("llama"), tokenizer))


def test_take(model):
    with pytest.raises(IndexError):
        tasks.contrast("greater_than", model, count=3).take([3])
