"""Learned task vectors: what cannot be learned is refused before anything is run; broken and foreign files."""

import pytest
import torch

import engine
import models
from engine import Example
from engine.methods.learned import LearnedVector
from models import zoo
from tests.refusal import EXAMPLES, refused


def extract(model, examples=EXAMPLES, units=(1,), **options):
    return engine.learned.extract(model, examples, units, **dict(steps=2, progress=False) | options)


BAD = {
    "no units": (dict(units=[]), ValueError, ("at least one", "0 units")),
    "units of two rows": (dict(units=torch.ones(2, 3, dtype=torch.bool)), ValueError, ("one row", "2 rows")),
    "layer outside": (dict(units=[3]), IndexError, ("3", "0..2")),
    "pairs of one unit": (dict(units=[(0, 1)]), IndexError, ("1",)),
    "no site": (dict(site="head"), ValueError, ("head",)),
    "scores": (dict(site="scores", units=[(0, 0)]), ValueError, ("scores", "each token")),
    "position": (dict(positions=[-1, 40]), IndexError, ("40", "outside")),
    "one token twice": (dict(positions=[-1, 8]), ValueError, ("positions [-1, 8]", "same token twice", "9 tokens")),
    "position as text": (dict(positions="last"), TypeError, ("positions", "last")),
    "decay": (dict(weight_decay=-1.0), ValueError, ("weight_decay >= 0", "-1.0")),
    "decay as text": (dict(weight_decay="no"), ValueError, ("weight_decay", "'no'")),
    "patience": (dict(patience=0), ValueError, ("patience", "0")),
    "look_every": (dict(look_every=0), ValueError, ("look_every", "0")),
    "no steps": (dict(steps=0), ValueError, ("steps >= 1", "steps=0")),
    "lr": (dict(lr=0), ValueError, ("lr > 0",)),
    "prompts": (dict(prompts_per_step=0), ValueError, ("prompts_per_step >= 1",)),
    "loss": (dict(loss="all"), ValueError, ("loss must be one of", "'all'")),
    "no examples": (dict(examples=[]), ValueError, ("no examples",)),
    "empty answer": (dict(examples=[Example("abc", "")]), ValueError, ("answer", "''")),
    "validation": (dict(validation=[Example("abc", 97)]), ValueError, ("97", "vocabulary")),
    "on_step": (dict(on_step=3), TypeError, ("on_step", "3")),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD.values(), ids=BAD)
def test_extract(model, options, error, words):
    with refused(model, error, *words):
        extract(model, **options)


OTHERS = {
    "lr": (dict(lr=0.5), ("lr", "0.5")),
    "weight_decay": (dict(weight_decay=0.5), ("weight_decay", "0.5")),
    "units": (dict(units=[2]), ("units",)),
    "positions": (dict(positions=-2), ("positions",)),
    "examples": (dict(examples=EXAMPLES[::-1]), ("data",)),
}


@pytest.mark.parametrize(("options", "words"), OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_search(model, tmp_path, options, words):
    checkpoint = tmp_path / "search.safetensors"
    extract(model, checkpoint=checkpoint)
    with refused(model, ValueError, "another search", *words):
        extract(model, checkpoint=checkpoint, **options)


def test_a_model_without_gradients(monkeypatch):
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="quantised")
    extract(model)
    pack = model.pack
    monkeypatch.setattr(model, "pack", lambda *args, **options: torch.no_grad()(pack)(*args, **options))
    with pytest.raises(models.UnsupportedModelError, match="quantised records no gradients"):
        extract(model)


def test_files(model, tiny, tmp_path):
    path = tmp_path / "learned.safetensors"
    units = torch.tensor([[True], [False], [False]])
    LearnedVector("resid_post", units, torch.zeros(1, 1, 48), metadata={"model": model.name}).save(path)
    LearnedVector.load(path, model)
    with refused(tiny("mistral"), ValueError, "tiny-llama", "tiny-mistral", "resid_post"):
        LearnedVector.load(path, tiny("mistral"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated"):
        LearnedVector.load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        LearnedVector.load(tmp_path / "nothing.safetensors")
