"""What tests of bad input share: a call is refused, nothing was run, and the model is left as it was."""

from contextlib import contextmanager

import pytest
import torch

from engine import Example
from models.calls import Passing

# The tiny llama has 3 layers, 6 heads of 8, 97 tokens, a context of 128.
MASK = torch.ones(2, 3, 6, dtype=torch.bool)
VALUES = torch.zeros(3, 6, 8)
EXAMPLES = [Example("Q: hot\nA:", " cold"), Example("Q: big\nA:", " small")]


def state(model):
    """Everything a call could leave behind in a model."""
    modules = [(len(m._forward_pre_hooks), "forward" in m.__dict__, m.training) for m in model.body.modules]
    return modules, model.config._attn_implementation


@contextmanager
def refused(model, error, *words):
    """Within: `error` is raised, with all the words in its message; nothing runs and nothing is left behind."""
    before, runs = state(model), []
    handle = model.hf.register_forward_pre_hook(Passing(lambda *_: runs.append("run")))
    try:
        with pytest.raises(error) as caught:
            yield
    finally:
        handle.remove()
    assert not runs
    assert state(model) == before
    for word in words:
        assert word in str(caught.value)


def nan_at(*index, shape=(3, 6, 8), number=float("nan")):
    values = torch.zeros(shape)
    values[index] = number
    return values
