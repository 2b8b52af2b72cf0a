"""Models that run parts again in the backward pass: gradients are those without, the base gets none."""

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as torchs
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from engine import weights
from models import zoo
from tests.engine.weights.networks import draw, finetuned

reentrant = pytest.mark.parametrize("reentrant", [False, True])
VERBS = {"forward": weights.forward, "naive": weights.naive.forward}


class Net(nn.Module):
    """`again`: the first layer is run again; else not."""

    def __init__(self, again=None):
        super().__init__()
        self.inner, self.outer, self.again = nn.Linear(4, 4), nn.Linear(4, 3), again

    def forward(self, x):
        def run(q):
            return torch.tanh(self.inner(q))

        return self.outer(run(x) if self.again is None else checkpoint(run, x, use_reentrant=self.again))


class Recurrent(Net):
    """What runs again is inside a module that runs sample by sample."""

    def __init__(self, again=None):
        super().__init__(again)
        self.inner = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        def run(q):
            return self.inner(q[:, None])[0][:, 0]

        return self.outer(run(x) if self.again is None else checkpoint(run, x, use_reentrant=self.again))


class Sequence(nn.Module):
    def __init__(self, again=None):
        super().__init__()
        self.all, self.again = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Conv1d(2, 2, 2)), again

    def forward(self, x):
        x = x[:, None]
        return self.all(x) if self.again is None else checkpoint_sequential(self.all, 2, x, use_reentrant=self.again)


def gradients(kind, again, verb, single):
    torch.manual_seed(0)
    base = kind().double()
    vectors = weights.task_vectors(base, *finetuned(base, 2))
    x, c = torch.randn(5, 4, dtype=torch.float64).requires_grad_(), draw(vectors, 5)
    c = (c[0] if single else c).requires_grad_()
    base.again = again
    answer = verb(base, x, vectors, c)
    found = torch.autograd.grad(answer.square().sum(), [c, x], retain_graph=True)
    answer.square().sum().backward()
    assert all(p.grad is None for p in base.parameters())
    return found


@reentrant
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("kind", [Net, Recurrent, Sequence])
def test_gradients(kind, verb, single, reentrant):
    got, want = (gradients(kind, again, verb, single) for again in (reentrant, None))
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= 1e-12 * y.abs().max()


@reentrant
def test_within_merged(reentrant):
    base, other = Net(reentrant), Net()
    vectors = weights.task_vectors(base, other)
    x = torch.randn(2, 4).requires_grad_()
    with weights.merged(base, vectors, torch.ones(1, 4)):
        answer = base(x)
    (got,) = torch.autograd.grad(answer.sum(), x)
    (want,) = torch.autograd.grad(other(x).sum(), x)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # it has another name since transformers 5.23
@reentrant
@pytest.mark.parametrize("single", [False, True])
def test_transformers(reentrant, single):
    hf = zoo.tiny("llama").double().train()
    vectors = weights.task_vectors(hf, *finetuned(hf, 2, by=0.05))
    c = draw(vectors, 2)
    c = (c[0] if single else c).requires_grad_()
    ids, found = torch.arange(8).view(2, 4), []
    for again in (False, True):
        if again:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        logits = weights.forward(hf, {"input_ids": ids}, vectors, c).logits
        found.append(torch.autograd.grad(logits.square().sum(), c)[0])
    assert hf.is_gradient_checkpointing  # the checkpoints were on
    assert (found[1] - found[0]).abs().max() <= 1e-12 * found[0].abs().max()
    assert all(p.grad is None for p in hf.parameters())


def test_checkpoints_are_torchs_own_afterwards():
    before = torchs.CheckpointFunction, torchs._checkpoint_without_reentrant_generator
    base, runs = Net(), []
    vectors = weights.task_vectors(base, Net())
    first, second = (weights.merged(base, vectors, torch.ones(1, 4)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as of two threads
    checkpoint(lambda q: runs.append(1) or q.tanh(), torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    assert len(runs) == 1
    second.__exit__(None, None, None)
    assert (torchs.CheckpointFunction, torchs._checkpoint_without_reentrant_generator) == before
    checkpoint(lambda q: runs.append(1) or q.tanh(), torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    assert len(runs) == 3
