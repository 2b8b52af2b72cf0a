"""What is saved comes back whole; what cannot be saved leaves what was there."""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from safetensors import safe_open

import engine
from engine import artifacts
from engine.artifacts import can_begin, load_tensors, save_tensors, write_whole


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


def test_tensors_that_share_memory(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    given = {"whole": whole, "again": whole, "rows": whole[1:3], "none": whole[:0], "column": whole[:, 0]}
    save_tensors(tmp_path / "x", given, {})
    tensors, _ = load_tensors(tmp_path / "x", tuple(given))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in given.items())


def test_arrays_in_metadata(tmp_path):
    given = {"int": np.int64(3), "float": np.float32(0.5), "bool": np.bool_(True), "list": [np.int32(1), np.eye(2)]}
    save_tensors(tmp_path / "x", {}, given | {"tensor": torch.tensor([1, 2])})
    wanted = {"int": 3, "float": 0.5, "bool": True, "list": [1, [[1.0, 0.0], [0.0, 1.0]]], "tensor": [1, 2]}
    assert load_tensors(tmp_path / "x", ())[1] == wanted
    with pytest.raises(TypeError, match=r"metadata must be JSON.*got set: \{1\}"):
        save_tensors(tmp_path / "x", {}, {"set": {1}})
    assert load_tensors(tmp_path / "x", ())[1] == wanted


@pytest.mark.parametrize("name", ["x" * 250, "ž" * 120, "[" * 240])
def test_a_long_name(tmp_path, writing, name):
    """Leaves no room in the name of a scratch file; one that a dead process left goes all the same."""
    path = tmp_path / name
    process = writing(path)
    process.kill()
    process.wait()
    write_whole(path, "new")
    assert os.listdir(tmp_path) == [name]
    assert path.read_text() == "new"
    assert not can_begin(path)


def test_a_link_stays_a_link(tmp_path, writing):
    """What it points to is written, which may lie on another disk; scratch files lie beside that."""
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "link", tmp_path / "disk" / "file"
    link.symlink_to(file)
    assert can_begin(link)
    for said in ("old", "new"):
        process = writing(link)
        process.kill()
        process.wait()
        write_whole(link, said)
        assert link.is_symlink()
        assert file.read_text() == said
        assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
        assert os.listdir(tmp_path / "disk") == ["file"]
    assert not can_begin(link)


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


SLOW = """
import os, sys
from engine.artifacts import write_whole
sync = os.fsync
def slowly(handle):
    sync(handle)
    print("half", flush=True)
    sys.stdin.readline()
os.fsync = slowly
write_whole(sys.argv[1], "new")
"""


@pytest.fixture
def writing(tmp_path):
    """A function: a process that is in the middle of writing a file, until it is told to go on."""
    started = []

    def start(path):
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", SLOW, path], stdin=pipe, stdout=pipe, text=True)
        started.append(process)
        assert process.stdout.readline() == "half\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_goes(tmp_path, writing):
    """With the next write, and where a search or a sweep looks for its checkpoint."""
    path = tmp_path / "a[b]*.ckpt"
    for begin in (lambda: write_whole(path, "whole"), lambda: can_begin(path)):
        process = writing(path)
        process.kill()
        process.wait()
        assert len(os.listdir(tmp_path)) == 1 + path.exists()
        begin()
        assert os.listdir(tmp_path) == [path.name]
        assert path.read_text() == "whole"


def test_what_others_write_stays(tmp_path, writing):
    path = tmp_path / "ckpt"
    beside = [writing(path), writing(path), writing(tmp_path / "ckpt.0")]
    beside[1].kill()
    beside[1].wait()
    (tmp_path / ".ckpt.settings").write_text("of the user")
    (tmp_path / ".ckpt.0.settings.scratch").write_text("of the user")
    assert len(list(tmp_path.glob(".*.scratch"))) == 4
    write_whole(path, "mine")
    left = sorted(name.split(".")[1:-2] for name in os.listdir(tmp_path) if name.endswith(".scratch"))
    assert left == [["ckpt"], ["ckpt", "0"], ["ckpt", "0"]]
    assert path.read_text() == "mine"
    beside[0].communicate("go on\n")
    assert beside[0].returncode == 0
    assert path.read_text() == "new"
    assert (tmp_path / ".ckpt.settings").exists()


def test_a_scratch_file_that_went_before_it_was_locked(tmp_path, monkeypatch):
    """Between its making and its locking another process may take it for a dead one's."""
    made = []
    make = tempfile.mkstemp

    def mkstemp(**where):
        handle, scratch = make(**where)
        made.append(scratch)
        if len(made) == 1:
            os.unlink(scratch)
        return handle, scratch

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    write_whole(tmp_path / "x", "new")
    assert len(made) == 2
    assert (tmp_path / "x").read_text() == "new"


def test_without_locks_nothing_is_removed(tmp_path, writing, monkeypatch):
    process = writing(tmp_path / "x")
    process.kill()
    process.wait()
    monkeypatch.setattr(artifacts, "fcntl", None)
    write_whole(tmp_path / "x", "new")
    assert len(os.listdir(tmp_path)) == 2


def test_a_search_that_was_killed_while_it_wrote(model, tmp_path, writing):
    """Goes on from its last checkpoint, and leaves nothing else behind."""
    path, examples = tmp_path / "search", [engine.Example("abc", "d")]
    options = dict(rollouts=2, progress=False, checkpoint=path, checkpoint_every=1)
    engine.mtv.extract(model, examples, torch.zeros(3, 6, 8), steps=1, **options)
    before = path.read_bytes()
    process = writing(path)
    process.kill()
    process.wait()
    assert path.read_bytes() == before
    engine.mtv.extract(model, examples, torch.zeros(3, 6, 8), steps=2, **options)
    assert os.listdir(tmp_path) == ["search"]
