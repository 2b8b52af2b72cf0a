"""Bad input is refused by the documented exception, in words that say what was given and what was expected; nothing is
run, the model is left as it was.
"""

from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from engine import weights
from models import UnsupportedModelError, zoo


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids):
        return self.out(self.table(ids))


@contextmanager
def refused(model, error, *words):
    """Within: `error` is raised, with all the words in its message; nothing runs and nothing is left behind."""
    held, runs = [id(p) for p in model.parameters()], []
    handle = model.register_forward_pre_hook(lambda *_: runs.append("run"))
    try:
        with pytest.raises(error) as caught:
            yield
    finally:
        handle.remove()
    assert not runs
    assert [id(p) for p in model.parameters()] == held
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def base():
    return Tied()


@pytest.fixture
def vectors(base):
    return weights.task_vectors(base, Tied(), Tied())


def without(model, key):
    return {name: x for name, x in model.state_dict().items() if name != key}


def with_nan():
    made = Tied()
    made.out.bias.data[3] = float("nan")
    return made


def quantised(dtype):
    return {**Tied().state_dict(), "out.bias": torch.zeros(5, dtype=dtype)}


FINETUNED = {
    "another architecture": (lambda: nn.Linear(4, 5), ValueError, ("Linear", "table.weight", "same architecture")),
    "missing": (lambda: without(Tied(), "out.bias"), ValueError, ("out.bias", "same architecture")),
    "extra": (lambda: {**Tied().state_dict(), "more": torch.ones(1)}, ValueError, ("more", "which the base has not")),
    "another shape": (
        lambda: {**Tied().state_dict(), "out.bias": torch.ones(4)},
        ValueError,
        ("out.bias", "[4]", "[5]"),
    ),
    "nan": (with_nan, ValueError, ("out.bias", "NaN")),
    "tied in the base alone": (lambda: Tied(False), ValueError, ("table.weight and out.weight", "tied", "one block")),
    "int8": (lambda: quantised(torch.int8), UnsupportedModelError, ("out.bias", "torch.int8", "quantised")),
    "float8": (lambda: quantised(torch.float8_e4m3fn), UnsupportedModelError, ("out.bias", "float8")),
    "meta": (lambda: Tied().to("meta"), UnsupportedModelError, ("not in memory",)),
    "numpy": (lambda: {**Tied().state_dict(), "out.bias": np.ones(5)}, UnsupportedModelError, ("out.bias", "ndarray")),
    "text": (lambda: "model", TypeError, ("str", "torch.nn.Module")),
    "none": (lambda: None, TypeError, ("NoneType", "torch.nn.Module")),
}


@pytest.mark.parametrize(("made", "error", "words"), FINETUNED.values(), ids=FINETUNED)
def test_finetuned_models(base, made, error, words):
    with refused(base, error, *words):
        weights.task_vectors(base, made())


def test_bases(base):
    with pytest.raises(ValueError, match="no finetuned model"):
        weights.task_vectors(base)
    with pytest.raises(ValueError, match="no parameters"):
        weights.task_vectors(nn.ReLU(), nn.ReLU())
    with pytest.raises(TypeError, match="OrderedDict"):
        weights.task_vectors(base.state_dict(), base)
    with pytest.raises(UnsupportedModelError, match="int8"):
        weights.task_vectors(whole_numbers(), base)


def whole_numbers():
    made = Tied()
    made.out.bias = nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False)
    return made


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::UserWarning")
def test_dynamically_quantised():
    pytest.importorskip("torch.ao.nn.quantized.dynamic")
    made = nn.Sequential(nn.Embedding(5, 4), torch.ao.nn.quantized.dynamic.Linear(4, 5))
    with pytest.raises(UnsupportedModelError, match="1 is quantised"):
        weights.task_vectors(made, made)


@pytest.mark.parametrize("names", ["a", ["a"], ["a", "a"], ["a", 1], ["a", "b", "c"]], ids=repr)
def test_names(base, names):
    with refused(base, ValueError, "2 different texts", str(names)[:8]):
        weights.task_vectors(base, Tied(), Tied(), names=names)


IDS = torch.zeros(3, 2, dtype=torch.long)
C = torch.zeros(3, 2, 2)
BAD = {
    "one vector too few": (C[:, :1], ValueError, ("[3, 1, 2]", "[2, 2] or [batch, 2, 2]")),
    "a tied block too many": (torch.zeros(3, 2, 3), ValueError, ("[3, 2, 3]", "vectors x parameter blocks")),
    "one dimension": (torch.zeros(2), ValueError, ("[2]", "[batch, 2, 2]")),
    "four dimensions": (C[None], ValueError, ("[1, 3, 2, 2]",)),
    "no samples": (C[:0], ValueError, ("[0, 2, 2]",)),
    "nan": (C.clone().index_fill_(0, torch.tensor(1), float("nan")), ValueError, ("nan", "[1, 0, 0]")),
    "infinite": (C + float("inf"), ValueError, ("inf", "[0, 0, 0]")),
    "integers": (C.long(), TypeError, ("torch.int64", "floating-point")),
    "list": ([[1.0]], TypeError, ("list",)),
    "none": (None, TypeError, ("NoneType",)),
    "other samples": (torch.zeros(4, 2, 2), ValueError, ("4 samples", "[3, 2]")),
}


@pytest.mark.parametrize("verb", [weights.forward, weights.naive.forward], ids=["forward", "naive"])
@pytest.mark.parametrize(("c", "error", "words"), BAD.values(), ids=BAD)
def test_coefficients(base, vectors, verb, c, error, words):
    with refused(base, error, *words):
        verb(base, IDS, vectors, c)


def test_coefficients_of_one_merge(base, vectors):
    with refused(base, ValueError, "[2, 2]", "[3, 2, 2]"), weights.merged(base, vectors, C):
        pass


@pytest.mark.parametrize("blocks", ["tensor", None, ["parameter"], "layers"], ids=repr)
def test_blocks(base, vectors, blocks):
    with refused(base, ValueError, repr(blocks), "'layer'"):
        weights.forward(base, IDS, vectors, C, blocks=blocks)
    with refused(base, ValueError, repr(blocks), "'layer'"):
        vectors.blocks(blocks)


def test_ways(base, vectors):
    with refused(base, ValueError, "'fast'", "'merge'"):
        weights.forward(base, IDS, vectors, C, way="fast")
    with refused(base, ValueError, "low_rank", "whole ones"):
        weights.forward(base, IDS, vectors, C, way="low_rank")
    with refused(base, ValueError, "'wide'", "of low rank"):
        weights.forward(base, IDS, vectors.low_rank(1), C, way="wide")


INPUTS = {
    "none": (None, TypeError, ("NoneType",)),
    "text": ("abc", TypeError, ("'abc'", "by name")),
    "a tuple": ((IDS,), TypeError, ("tuple",)),
    "no arguments": ({}, TypeError, ("dict",)),
    "by number": ({0: IDS}, TypeError, ("dict",)),
    "no tensor": ({"ids": 3}, ValueError, ("3 samples", "no tensor")),
    "other samples": ({"ids": IDS[:2]}, ValueError, ("3 samples", "'ids'", "[2, 2]")),
    "one of another size": ({"ids": IDS, "mask": torch.ones(2, 3)}, ValueError, ("'mask'", "[2, 3]")),
    "a single number": ({"ids": IDS, "mask": torch.tensor(1)}, ValueError, ("'mask'", "[]")),
}


@pytest.mark.parametrize(("inputs", "error", "words"), INPUTS.values(), ids=INPUTS)
def test_inputs(base, vectors, inputs, error, words):
    with refused(base, error, *words):
        weights.forward(base, inputs, vectors, C)


def test_caches():
    hf = zoo.tiny("gpt2")
    vectors = weights.task_vectors(hf, zoo.tiny("gpt2"))
    c = torch.zeros(2, 1, len(vectors.blocks()))
    with refused(hf, ValueError, "cache"):
        weights.forward(hf, {"input_ids": IDS[:2], "use_cache": True}, vectors, c)


def test_models_and_vectors(base, vectors):
    other = nn.Linear(4, 5)
    with refused(other, ValueError, "Tied", "Linear", "weight"):
        weights.forward(other, IDS, vectors, C)
    with refused(base, ValueError, "Linear", "they lack"):
        weights.forward(base, IDS, weights.task_vectors(other, nn.Linear(4, 5)), C)
    wide = deepcopy(base)
    wide.out.bias = nn.Parameter(torch.zeros(6))
    with refused(wide, ValueError, "out.bias", "[6]", "[5]"):
        weights.forward(wide, IDS, vectors, C)
    double = deepcopy(base).double()
    with refused(double, ValueError, "float64", "float32", "vectors.to"):
        weights.forward(double, IDS, vectors, C)
    untied = Tied(False)
    with refused(untied, ValueError, "out.weight"):
        weights.forward(untied, IDS, vectors, C)
    with refused(base, TypeError, "dict", "TaskVectors"):
        weights.forward(base, IDS, vectors.tensors, C)
    with pytest.raises(TypeError, match="Module"):
        weights.forward("model", IDS, vectors, C)
    turned = whole_numbers()
    with refused(turned, UnsupportedModelError, "torch.int8"):
        weights.forward(turned, IDS, vectors, C)


def test_batch_norm_that_trains():
    base = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    vectors = weights.task_vectors(base, deepcopy(base))
    with refused(base, ValueError, "1 is batch norm", "eval"):
        weights.forward(base, torch.ones(3, 4), vectors, torch.zeros(3, 1, 4))
    assert weights.forward(base.eval(), torch.ones(3, 4), vectors, torch.zeros(3, 1, 4)).shape == (3, 3)


def test_autocast(base, vectors):
    with refused(base, ValueError, "autocast"), torch.autocast("cpu", dtype=torch.bfloat16):
        weights.forward(base, IDS, vectors, C)


def test_answers_of_the_whole_batch():
    hf = zoo.tiny("gpt2")
    vectors = weights.task_vectors(hf, zoo.tiny("gpt2"))
    c = torch.zeros(3, 1, len(vectors.blocks()))
    with pytest.raises(UnsupportedModelError, match="no loss"):
        weights.forward(hf, {"input_ids": IDS, "labels": IDS}, vectors, c)


def test_arithmetic(base, vectors):
    one = weights.task_vectors(base, Tied())
    with pytest.raises(ValueError, match="as many vectors"):
        vectors + one
    with pytest.raises(ValueError, match="as many vectors"):
        one + weights.task_vectors(nn.Linear(4, 5), nn.Linear(4, 5))
    with pytest.raises(TypeError, match="int"):
        vectors + 1
    for by in ("a", None, float("nan"), True, torch.ones(2)):
        with pytest.raises(TypeError, match="finite number"):
            vectors * by


def test_ranks(vectors):
    for rank in (0, -1, 1.5, None, True):
        with pytest.raises(ValueError, match="rank must be a positive integer"):
            vectors.low_rank(rank)
    with pytest.raises(ValueError, match="low rank already"):
        vectors.low_rank(2).low_rank(1)


def test_files(vectors, tmp_path):
    with pytest.raises(FileNotFoundError):
        weights.TaskVectors.load(tmp_path / "none.safetensors")
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    whole = path.read_bytes()
    for content in (b"", b"abc", whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated, or not a file of task vectors"):
            weights.TaskVectors.load(path)
