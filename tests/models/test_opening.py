"""Models opened by name, from folders, by every backend; what cannot be opened is told plainly."""

import builtins
import importlib.util
import sys

import pytest
import torch
from PIL import Image

import engine
import models
from models import Prompt, tiny

BACKENDS = ("huggingface", "transformer_lens", "nnsight")
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of the libraries behind the backends, at import


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny language model on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny("llama").save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def test_one_word_changes_the_backend(folder, draw):
    by = {backend: models.load(folder, backend=backend) for backend in BACKENDS}
    heads, values = draw(by["huggingface"], rows=4)
    text = "Q: hot\nA: cold\n\nQ: big\nA:"
    want = engine.naive.patch(by["huggingface"], text, heads=heads, values=values)
    for model in by.values():
        assert model.shape == by["huggingface"].shape
        assert engine.plan(model, text, rows=4).strategy == "packed"
        got = engine.patch(model, text, heads=heads, values=values)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        naive = engine.naive.patch(model, text, heads=heads, values=values)
        torch.testing.assert_close(naive, want, atol=1e-5, rtol=0)
        options = dict(heads=heads, values=values, max_new_tokens=4)
        assert engine.generate(model, text, **options) == engine.generate(by["huggingface"], text, **options)


def test_wrap_recognises(folder, draw):
    from nnsight import NNsight
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = tiny.tiny("llama")
    names = [type(models.wrap(x)).__name__ for x in (hf, NNsight(tiny.tiny("llama")))]
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    assert [*names, type(models.wrap(bridge)).__name__] == ["HuggingFace", "NNsightBackend", "TransformerLens"]


def test_dtype_and_device_map(folder):
    assert models.load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert models.load(folder, device_map="cpu").device.type == "cpu"


def test_an_image_text_model_from_a_folder(tmp_path, draw, monkeypatch):
    from transformers import AutoProcessor

    tiny.tiny("llava").save_pretrained(tmp_path)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda _: tiny.tiny_processor("llava"))
    model = models.load(tmp_path)
    heads, values = draw(model)
    prompt = Prompt("<image> which?\nA:", (Image.new("RGB", (28, 28), "red"),))
    got = engine.patch(model, prompt, heads=heads, values=values)
    torch.testing.assert_close(got, engine.naive.patch(model, prompt, heads=heads, values=values), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("backend", "library", "extra"), [
    ("transformer_lens", "transformer_lens", "lens"), ("nnsight", "nnsight", "nnsight"),
])  # fmt: skip
def test_a_missing_library_names_its_extra(folder, monkeypatch, backend, library, extra):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.split(".")[0] == library:
            raise ImportError(name)
        return real(name, *rest, **named)

    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"headpatch\[{extra}\]"):
        models.load(folder, backend=backend)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision(tmp_path, monkeypatch):
    """It is told before the weights are read."""
    from transformers import AutoModelForImageTextToText

    tiny.tiny("qwen2_vl").save_pretrained(tmp_path)
    tiny.tiny_processor("qwen2_vl").save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("weights read"))
    with pytest.raises(ImportError, match=r"needs torchvision.*headpatch\[vision\]"):
        models.load(tmp_path)
