"""Bad input to `engine.vtvc` is refused before any step, in words that name it."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import engine


@pytest.fixture
def base():
    return nn.Linear(3, 2)


@pytest.fixture
def given(base):
    return dict(
        model=base,
        vectors=engine.weights.task_vectors(base, deepcopy(base)),
        inputs=torch.randn(6, 3),
        loss=lambda logits, at: logits.sum(dim=1),
        progress=False,
        epochs=1,
    )


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (dict(vectors="x"), TypeError, ("TaskVectors", "str")),
        (dict(model=nn.Linear(4, 2)), ValueError, ("[2, 4]", "[2, 3]")),
        (dict(inputs=[1]), (TypeError, ValueError), ("list",)),
        (dict(inputs={}), ValueError, ("samples",)),
        (dict(inputs=torch.zeros(0, 3)), ValueError, ("samples",)),
        (dict(inputs={"input": torch.zeros(2, 3), "more": torch.zeros(3, 3)}), ValueError, ("'more': 3",)),
        (dict(loss=3), TypeError, ("function", "int")),
        (dict(posterior="gate"), ValueError, ("'gate'", "spike_and_slab")),
        (dict(features=torch.zeros(5, 2)), ValueError, ("[6 samples", "[5, 2]")),
        (dict(features=torch.full((6, 2), float("nan"))), ValueError, ("finite", "row 0")),
        (dict(features=torch.zeros(6, 2).long()), ValueError, ("int64",)),
        (dict(blocks="head"), ValueError, ("'head'",)),
        (dict(constants={}), TypeError, ("Constants", "dict")),
        (dict(constants=engine.vtvc.Constants(psi1=0.0)), ValueError, ("psi1", "0.0")),
        (dict(constants=engine.vtvc.Constants(pi=1.0)), ValueError, ("pi", "1.0")),
        (dict(constants=engine.vtvc.Constants(kl=float("nan"))), ValueError, ("kl", "nan")),
        (dict(epochs=0), ValueError, ("epochs", "0")),
        (dict(batch=1.5), (TypeError, ValueError), ("batch", "1.5")),
        (dict(lr=0), ValueError, ("lr", "0")),
        (dict(lr=float("inf")), ValueError, ("lr", "inf")),
        (dict(weight_decay=-1), ValueError, ("weight_decay", "-1")),
        (dict(clip=True), ValueError, ("clip", "True")),
        (dict(seed=1.5), (TypeError, ValueError), ("seed", "1.5")),
        (dict(checkpoint_every=0), ValueError, ("checkpoint_every", "0")),
    ],
)
def test_refused(given, wrong, error, words):
    with pytest.raises(error) as caught:
        engine.vtvc.fit(**{**given, **wrong})
    for word in words:
        assert word in str(caught.value)


def test_a_loss_of_another_shape_or_not_finite(given):
    with pytest.raises(ValueError, match=r"one number a sample, \[6\], got torch.float32 \[\]"):
        engine.vtvc.fit(**given | {"loss": lambda logits, at: logits.sum()})
    with pytest.raises(ValueError, match="loss of sample 3 is not finite at step 0"):
        engine.vtvc.fit(**given | {"loss": lambda logits, at: torch.where(at == 3, torch.nan, logits.sum(dim=1))})


def test_a_base_or_vectors_of_inference_mode(given, base):
    with torch.inference_mode():
        other, vectors = nn.Linear(3, 2), engine.weights.task_vectors(base, deepcopy(base))
        low = engine.weights.task_vectors(base, nn.Linear(3, 2)).low_rank(1)
        for wrong, words in (
            (dict(model=other), "base"),
            (dict(vectors=vectors), "vectors"),
            (dict(vectors=low), "vec"),
        ):
            with pytest.raises(ValueError, match=rf"the {words}.* from within torch.inference_mode\(\)"):
                engine.vtvc.fit(**given | wrong)


@pytest.mark.parametrize("kind", ["gated", "deterministic"])
def test_a_loss_without_gradients(given, kind):
    with pytest.raises(ValueError, match="loss must have gradients"):
        engine.vtvc.fit(**given | {"loss": lambda logits, at: logits.detach().sum(dim=1)}, posterior=kind)


def test_a_gradient_that_overflows(given):
    base = given["model"].half()
    vectors = engine.weights.task_vectors(base, nn.Linear(3, 2).half())
    slopes = torch.full((6, 2), 60000.0).half()  # of a loss that is 0
    loss = lambda logits, at: ((logits - logits.detach()) * slopes[at] * 6).sum(dim=1)  # noqa: E731
    with pytest.raises(ValueError, match="gradient is not finite at step 0"):
        engine.vtvc.fit(**given | dict(vectors=vectors, inputs=given["inputs"].half() * 1000, loss=loss))


class Scaled(nn.Module):
    """A base with tied weights and a buffer, and inputs by name that are not all tensors."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x, times=1.0, how=None):
        return self.outer(self.inner(x) * self.scale) * times


def test_a_checkpoint_of_other_inputs_or_another_base_where_features_are_given(tmp_path):
    torch.manual_seed(0)
    base, x, h = Scaled(), torch.randn(6, 3), torch.randn(6, 2)
    tuned = deepcopy(base)
    tuned.inner.weight.data += 1
    others = [deepcopy(base) for _ in range(2)]
    others[0].inner.weight.data[1, 2] += 1e-3
    others[1].scale[0] = 2
    file = tmp_path / "checkpoint.safetensors"
    given = dict(
        model=base, vectors=engine.weights.task_vectors(base, tuned), inputs={"x": x, "times": 2.0, "how": object()},
        loss=lambda outputs, at: outputs.sum(dim=1), features=h, epochs=1, progress=False, checkpoint=file,
    )  # fmt: skip
    made = engine.vtvc.fit(**given)
    moved = x.clone()
    moved[3, 1] += 1e-3
    for wrong, word in (
        ({"inputs": {"x": moved, "times": 2.0, "how": None}}, "data"),
        ({"inputs": {"x": x, "times": 3.0, "how": object()}}, "data"),
        ({"inputs": x}, "data"),
        ({"features": h + 1}, "data"),
        ({"model": others[0]}, "weights"),
        ({"model": others[1]}, "weights"),
        ({"vectors": given["vectors"] * 2 * 0.75}, "vectors"),
    ):
        with pytest.raises(ValueError, match=f"of something else: it has .*'{word}'"):
            engine.vtvc.fit(**given | wrong)
    alike = {"model": deepcopy(base), "inputs": {"how": object(), "times": 2.0, "x": x.clone()}}
    assert engine.vtvc.fit(**given | alike).metadata["losses"] == made.metadata["losses"]


def test_a_checkpoint_of_something_else(given, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    engine.vtvc.fit(**given, checkpoint=file)
    with pytest.raises(ValueError, match=r"'lr': 0\.01"):
        engine.vtvc.fit(**given | {"lr": 0.02}, checkpoint=file)
    with pytest.raises(ValueError, match="'data'"):
        engine.vtvc.fit(**given | {"inputs": torch.randn(6, 3)}, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated"):
        engine.vtvc.fit(**given, checkpoint=file)


def test_features_that_the_base_does_not_give(base):
    with pytest.raises(ValueError, match=r"give features="):
        engine.vtvc.features_of(nn.Conv1d(3, 2, 1), torch.zeros(4, 3, 5))
    with pytest.raises(ValueError, match="batch"):
        engine.vtvc.features_of(base, torch.zeros(4, 3), batch=0)


def test_files_of_something_else(base, tmp_path):
    engine.weights.task_vectors(base, deepcopy(base)).save(tmp_path / "vectors.safetensors")
    with pytest.raises(ValueError, match="not a file of a posterior"):
        engine.vtvc.Posterior.load(tmp_path / "vectors.safetensors")
    with pytest.raises(FileNotFoundError):
        engine.vtvc.Posterior.load(tmp_path / "none.safetensors")


def test_features_of_another_size():
    made = engine.vtvc.Posterior("gated", ("a",), ("b",), 3, engine.vtvc.Constants())
    for wrong in (torch.zeros(2, 4), torch.zeros(3), "x", torch.zeros(2, 3).long(), np.zeros((2, 3), dtype=np.int64)):
        with pytest.raises(ValueError, match=r"\[batch, 3\]"):
            made.coefficients(wrong)
