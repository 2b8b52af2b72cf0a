"""What is saved comes back whole; what cannot be saved leaves what was there."""

import json
import os

import pytest
import torch
from safetensors import safe_open

import engine
from engine.artifacts import load_tensors, save_tensors, write_whole


@pytest.fixture
def vector(model, draw):
    heads, values = draw(model, rows=1)
    metadata = {"model": model.name, "seed": 3, "losses": [1.5, 0.25], "versions": {"torch": "x"}, "task": "é"}
    return engine.TaskVector(heads[0], values, torch.rand(3, 6), metadata)


def test_round_trip(vector, model, tmp_path):
    path = tmp_path / "new" / "folder" / "vector.safetensors"
    vector.save(path)
    loaded = engine.TaskVector.load(path, model)
    for name in ("mask", "values", "probabilities"):
        one, other = getattr(vector, name), getattr(loaded, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert loaded.metadata == vector.metadata
    assert loaded.heads == vector.heads
    assert os.listdir(path.parent) == ["vector.safetensors"]


def test_works_after_the_round_trip(vector, model, tmp_path):
    vector.save(tmp_path / "v.safetensors")
    loaded = engine.TaskVector.load(str(tmp_path / "v.safetensors"), model)
    want = engine.patch(model, "abc", heads=vector.mask, values=vector.values)
    assert torch.equal(engine.patch(model, "abc", heads=loaded.heads, values=loaded.values), want)


def test_heads(vector, tmp_path):
    """(layer, head) pairs of the mask; also readable in the file by other programs."""
    assert all(vector.mask[layer, head] for layer, head in vector.heads)
    assert len(vector.heads) == vector.mask.sum()
    vector.save(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["headpatch"])
    assert [tuple(pair) for pair in metadata["heads"]] == vector.heads


def test_check(vector, model, tiny):
    vector.check(model)
    for other in ("mistral", "qwen3", "gpt2"):
        with pytest.raises(ValueError, match=f"'tiny-llama'.*does not fit 'tiny-{other}'"):
            vector.check(tiny(other))


def test_slices_and_graphs_are_saved_as_plain_tensors(tmp_path):
    source = torch.arange(24.0).view(4, 6).requires_grad_()
    save_tensors(tmp_path / "x", {"a": source.T, "b": source[:, :2]}, {"k": 1})
    tensors, metadata = load_tensors(tmp_path / "x", ("a", "b"))
    assert torch.equal(tensors["a"], source.T)
    assert torch.equal(tensors["b"], source[:, :2])
    assert metadata == {"k": 1}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_writing_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "notes.txt"
    write_whole(path, "old")

    def fail(*_):
        raise error("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(error, match="disk full"):
        write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]
    write_whole(path, b"new")
    assert path.read_text() == "new"
