"""Models that need no hub: tiny ones are the same at every call, the real one is converted once and whole."""

import string

import pytest
import torch
import transformers

import models
from models import zoo
from tests.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_the_same_at_every_call(family):
    torch.manual_seed(1)
    first = zoo.tiny(family)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # making one draws nothing from the caller's random numbers
    torch.manual_seed(2)
    second = zoo.tiny(family)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(module.training for module in first.modules())
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_unknown_family():
    with pytest.raises(ValueError, match=r"'lama'.*gpt2.*llama"):
        zoo.tiny("lama")


def test_tiny_tokenizer():
    tokenizer = zoo.tiny_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\n"
    assert set(string.printable) - set(text) == set("\t\r\x0b\x0c")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(set(ids)) == len(text) == 96
    assert max(ids) < 97
    assert tokenizer.decode(ids) == text
    assert tokenizer("é")["input_ids"] == [0]


def test_shape_for_benchmarks(smollm2):
    """The random model of SmolLM2's shape has its shape."""
    assert models.wrap(zoo.smollm2_shape(n_layers=30)).shape == smollm2.shape


def test_second_load_converts_nothing(smollm2, monkeypatch):
    def fail(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr("models.zoo._convert", fail)
    again = models.load("smollm2-135m")
    ids = smollm2.encode("The capital of France is")
    with torch.no_grad():
        assert torch.equal(again.forward(ids[None]), smollm2.forward(ids[None]))
    assert again.name == "smollm2-135m"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("part", ["AutoModelForCausalLM", "AutoTokenizer"])
def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch, part, error):
    """Neither half a model that the next load would take for a whole one, nor scratch files."""
    monkeypatch.setenv("HEADPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: zoo.tiny("llama"))

    def fail(*_, **__):
        raise error("power cut")

    monkeypatch.setattr(getattr(transformers, part), "from_pretrained", fail)
    with pytest.raises(error, match="power cut"):
        models.load("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


def test_conversion_by_two_at_once(tmp_path, monkeypatch):
    """The slower one drops its work and takes the other's."""
    hf, tokenizer = zoo.tiny("llama"), zoo.tiny_tokenizer()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: hf)
    folder = tmp_path / "model"

    def meanwhile(*_, **__):
        folder.mkdir()
        (folder / "theirs").write_text("")
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", meanwhile)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "weights.gguf").write_text("")
    zoo._convert(tmp_path / "package", folder)
    assert [p.name for p in folder.iterdir()] == ["theirs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "package"]


def test_broken_cache_is_named(tmp_path, monkeypatch, smollm2):
    monkeypatch.setenv("HEADPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("models.zoo._convert", lambda _, folder: folder.mkdir())
    with pytest.raises(OSError, match="delete that folder") as caught:
        models.load("smollm2-135m")
    assert str(tmp_path) in str(caught.value)
