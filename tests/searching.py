"""What tests of the search for heads share: a short one, the same at every call."""

import pytest
import torch

import engine
from engine import Example
from engine.methods.estimators import ESTIMATORS

PRESET = pytest.mark.parametrize("preset", ["paper", "reference"])
ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS)
OTHERS = [e for e in ESTIMATORS if e != "reinforce"]
EXAMPLES = [Example(f"Q: {'ab' * n}\nA:", f" {letter}") for n, letter in enumerate("cold", start=1)]


def search(model, steps=20, **options):
    """A short search, the same at every call."""
    means = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    by_gates = options.get("estimator") in ("straight_through", "relaxed")
    options = dict(rollouts=None if by_gates else 8, progress=False) | options
    return engine.mtv.extract(model, EXAMPLES, means, steps=steps, **options)


def same(one, other):
    """Bit for bit: probabilities, heads and every loss on the way."""
    assert torch.equal(one.probabilities, other.probabilities)
    assert torch.equal(one.mask, other.mask)
    assert one.metadata["losses"] == other.metadata["losses"]
    assert one.metadata["validation_loss"] == other.metadata["validation_loss"]
