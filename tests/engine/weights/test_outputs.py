"""Outputs whose samples are not their first dimension, and those that are of no sample."""

import pytest
import torch
from torch import nn

from engine import weights
from models import UnsupportedModelError
from tests.engine.weights.networks import draw, finetuned, leaves
from tests.engine.weights.test_apart import against_naive

VERBS = {"forward": weights.forward, "naive": weights.naive.forward}
verbs = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


class Answers(nn.Module):
    """A linear layer, and what is made of its output."""

    def __init__(self, made):
        super().__init__()
        self.inner, self.made = nn.Linear(4, 4), made

    def forward(self, x):
        return self.made(self, self.inner(x))


class Inside(nn.Module):
    """A recurrence whose state is read within the model."""

    def __init__(self, layers=2):
        super().__init__()
        self.recurrence, self.head = nn.LSTM(4, 3, layers, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        _, (h, _) = self.recurrence(x)
        return self.head(h[-1]), h


MODELS = {
    "lstm": lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True),
    "lstm of one layer": lambda: nn.LSTM(4, 3, batch_first=True, bidirectional=True),
    "gru": lambda: nn.GRU(4, 3, num_layers=3, batch_first=True),
    "inside": Inside,
    "inside, one layer": lambda: Inside(1),
    "tokens first": lambda: Answers(lambda m, y: (y.transpose(0, 1), y)),
    "shared": lambda: Answers(lambda m, y: {"y": y, "places": torch.arange(6), "said": "yes"}),
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_shapes_are_those_of_one_merge(made):
    torch.manual_seed(0)
    base, x = made().double(), torch.randn(5, 6, 4, dtype=torch.float64)
    vectors = weights.task_vectors(base, *finetuned(base, 2))
    c = draw(vectors, 5)[:1].expand(5, -1, -1)
    got, one = against_naive(base, x, c=c), weights.forward(base, x, vectors, c[0])
    for ours, theirs in zip(leaves(got), leaves(one), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


REFUSED = {
    "all pairs": (lambda m, y: y[:, 0] @ y[:, 0].T, "expected one dimension of each to be samples"),
    "squeezed": (lambda m, y: y.squeeze(), "expected one dimension of each to be samples"),
    "a list of samples": (lambda m, y: list(y), "expected one dimension of each to be samples"),
    "a weight": (lambda m, y: (y, m.inner.weight * 2), "no dimension of samples"),
    "a number of Python's": (lambda m, y: (y, float(y.detach().sum())), "no dimension of samples, and is another"),
    "a loss": (lambda m, y: y.mean(), "number for the whole batch"),
}


@verbs
@pytest.mark.parametrize(("made", "said"), REFUSED.values(), ids=REFUSED)
def test_outputs_that_are_of_no_sample_are_refused(verb, made, said):
    torch.manual_seed(0)
    base, x = Answers(made).double(), torch.randn(5, 6, 4, dtype=torch.float64)
    vectors = weights.task_vectors(base, *finetuned(base, 2))
    with pytest.raises(UnsupportedModelError, match=said):
        verb(base, x, vectors, draw(vectors, 5))
