"""What is found to run sample by sample: models whose parameters are read in a way that has no form for many."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from engine import weights
from tests.engine.weights.networks import draw, finetuned, off


def against_naive(base, x, count=2, c=None):
    """The model, left as it was, against the loop over copies of it."""
    vectors = weights.task_vectors(base, *finetuned(base, count))
    c = draw(vectors, len(x)) if c is None else c
    want = weights.naive.forward(deepcopy(base), x, vectors, c)
    before = {key: value.clone() for key, value in base.named_parameters()}
    got = weights.forward(base, x, vectors, c)
    assert off(got, want) <= 1e-12
    assert all(torch.equal(value, before[key]) for key, value in base.named_parameters())
    return got


class Listed(nn.Module):
    """Parameters of a module that is never called, too large to be merged for more than 16 samples at once."""

    def __init__(self, held=nn.ParameterList):
        super().__init__()
        w = nn.Parameter(torch.randn(6, 4))
        self.held = held({"w": w}) if held is nn.ParameterDict else held([w])

    def forward(self, x):
        w = self.held["w"] if isinstance(self.held, nn.ParameterDict) else self.held[0]
        return torch.einsum("bi,io->bo", x, w)


class Counted(Listed):
    """Its state is another one after every forward."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("batch", [16, 17])
@pytest.mark.parametrize(
    "made", [Listed, Counted, lambda: nn.Sequential(Listed(nn.ParameterDict), nn.Linear(4, 3))],
    ids=["list", "counted", "dict"],
)  # fmt: skip
def test_parameters_of_a_module_that_is_never_called(made, batch):
    torch.manual_seed(0)
    against_naive(made().double(), torch.randn(batch, 6, dtype=torch.float64))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_weights_that_are_computed_anew_in_training(norm):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), norm(nn.Linear(4, 3))).double().train()
    against_naive(base, torch.randn(5, 4, dtype=torch.float64))


def test_nested_tensors_that_do_not_begin_with_samples():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, extra):
            return self.inner(x) * extra[0].sum()

    base = Mixed()
    vectors = weights.task_vectors(base, Mixed())
    for extra in ([torch.arange(7.0)], {"a": (torch.arange(7.0),)}, [torch.tensor(1.0)]):
        for verb in (weights.forward, weights.naive.forward):
            with pytest.raises(ValueError, match="5 samples, each a row of every input: got input 'extra' of shape"):
                verb(base, {"x": torch.randn(5, 4), "extra": extra}, vectors, draw(vectors, 5, dtype=torch.float32))
