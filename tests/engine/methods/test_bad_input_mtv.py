"""Searches, their checkpoints and the vectors they leave: bad options and broken files are refused, nothing is run."""

import pytest
import torch

import engine
import models
from engine import Example
from models import zoo
from tests.refusal import EXAMPLES, MASK, VALUES, nan_at, refused


def extract(model, examples=EXAMPLES, means=VALUES, steps=2, **options):
    return engine.mtv.extract(model, examples, means, steps=steps, progress=False, **options)


BAD_SEARCHES = {
    "preset": (dict(preset="best"), ValueError, ("'best'", "paper", "reference")),
    "no steps": (dict(steps=0), ValueError, ("steps=0", "steps >= 1")),
    "one rollout": (dict(rollouts=1), ValueError, ("rollouts=1", "rollouts >= 2")),
    "lr zero": (dict(lr=0.0), ValueError, ("lr=0.0", "lr > 0")),
    "lr nan": (dict(lr=float("nan")), ValueError, ("lr=nan", "lr > 0")),
    "checkpoint never": (dict(checkpoint_every=0), ValueError, ("checkpoint_every=0", "checkpoint_every >= 1")),
    "candidates": (dict(candidates="all"), ValueError, ("candidates must be one of", "thresholds", "'all'")),
    "no examples": (dict(examples=[]), ValueError, ("no examples",)),
    "means of wrong shape": (dict(means=torch.zeros(3, 6, 7)), ValueError, ("[3, 6, 7]", "[3, 6, 8]")),
    "means a row": (dict(means=torch.zeros(1, 3, 6, 8)), ValueError, ("[1, 3, 6, 8]", "[3, 6, 8]")),
    "means nan": (dict(means=nan_at(2, 1, 0)), ValueError, ("NaN", "layer 2", "head 1")),
    "means list": (dict(means=[1.0]), TypeError, ("list", "tensor")),
    "no means": (dict(means=None), ValueError, ("[3, 6, 8]",)),
    "answer out of vocabulary": (dict(examples=[Example("abc", 97)]), ValueError, ("97", "vocabulary")),
    "negative answer": (dict(examples=[Example("abc", -1)]), ValueError, ("-1", "vocabulary")),
    "empty answer": (dict(examples=[Example("abc", "")]), ValueError, ("answer", "''")),
    "text answer to ids": (dict(examples=[Example([1, 2], " x")]), ValueError, ("answer", "[1, 2]")),
    "empty prompt": (dict(examples=[*EXAMPLES, Example("", "a")]), ValueError, ("empty",)),
    "validation answer": (dict(validation=[Example("abc", "")]), ValueError, ("answer", "''")),
    "validation prompt": (dict(validation=[Example([97], 1)]), ValueError, ("97", "[0, 97)")),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD_SEARCHES.values(), ids=BAD_SEARCHES)
def test_search(model, options, error, words):
    with refused(model, error, *words):
        extract(model, **options)


def test_search_by_text_without_a_tokenizer():
    model = models.wrap(zoo.tiny("llama"))
    with refused(model, ValueError, "tokenizer"):
        extract(model)


@pytest.fixture
def checkpoint(model, tmp_path):
    """A checkpoint of two steps."""
    path = tmp_path / "search.safetensors"
    extract(model, checkpoint=path)
    return path


OTHERS = {
    "seed": (dict(seed=1), ("seed",)),
    "preset": (dict(preset="paper"), ("preset", "paper", "reference")),
    "lr": (dict(lr=0.2), ("lr", "0.2")),
    "rollouts": (dict(rollouts=8), ("rollouts", "8")),
    "means": (dict(means=VALUES + 1), ("data",)),
    "examples": (dict(examples=EXAMPLES[::-1]), ("data",)),
}


@pytest.mark.parametrize(("options", "words"), OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_search(model, checkpoint, options, words):
    before = checkpoint.read_bytes()
    with refused(model, ValueError, "another search", str(checkpoint), *words):
        extract(model, checkpoint=checkpoint, **options)
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_another_model(tiny, checkpoint):
    model = tiny("mistral")  # of the same shape
    with refused(model, ValueError, "another search", "tiny-llama", "tiny-mistral"):
        extract(model, checkpoint=checkpoint)


def test_checkpoint_beyond_the_steps_asked_for(model, checkpoint):
    with refused(model, ValueError, str(checkpoint), "2 steps", "1"):
        extract(model, steps=1, checkpoint=checkpoint)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_truncated_checkpoint(model, checkpoint, kept):
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with refused(model, ValueError, str(checkpoint), "truncated"):
        extract(model, checkpoint=checkpoint)


@pytest.mark.parametrize("below", ["x", "x/y"])
def test_checkpoint_that_cannot_be_written(model, tmp_path, below):
    (tmp_path / "file").write_text("")
    with refused(model, OSError, "file"):
        extract(model, checkpoint=tmp_path / "file" / below)
    with refused(model, OSError, str(tmp_path)):
        extract(model, checkpoint=tmp_path)


# Saved vectors.


@pytest.fixture
def vector(model):
    return engine.TaskVector(MASK[0], VALUES, torch.full((3, 6), 0.5), {"model": model.name})


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_vector(vector, tmp_path, kept):
    path = tmp_path / "vector.safetensors"
    vector.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated") as caught:
        engine.TaskVector.load(path)
    assert str(path) in str(caught.value)


def test_missing_vector(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        engine.TaskVector.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        engine.TaskVector.load(tmp_path)


def test_files_that_are_no_vectors(model, checkpoint, tmp_path):
    from safetensors.torch import save_file

    other, text = tmp_path / "weights.safetensors", tmp_path / "notes.txt"
    save_file({"mask": MASK[0]}, other)
    text.write_text("a vector, perhaps?")
    for path in (other, text, checkpoint):
        with pytest.raises(ValueError, match="mask, values, probabilities") as caught:
            engine.TaskVector.load(path)
        assert str(path) in str(caught.value)


def test_vector_of_another_model(model, tiny, vector, tmp_path):
    path = tmp_path / "vector.safetensors"
    vector.save(path)
    for other in ("mistral", "qwen3"):  # of the same shape, and not
        with refused(tiny(other), ValueError, "tiny-llama", f"tiny-{other}", "[3, 6, 8]"):
            engine.TaskVector.load(path, tiny(other))
    assert engine.TaskVector.load(path, model).heads == vector.heads


def test_vector_that_cannot_be_saved(vector, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        vector.save(tmp_path / "file" / "vector.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        vector.save(tmp_path / "folder")  # the name is a folder's
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
