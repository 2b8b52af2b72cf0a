"""Gradients of coefficients and inputs, against finite differences and the plain loop."""

import pytest
import torch

from engine import weights
from tests.engine.weights.networks import NETWORKS, Attention, Convolutions, Tied, Vision, draw, leaves, setting

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*weight_norm.*:FutureWarning")
networks = pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)


def scalar(answer):
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in leaves(answer))


@networks
@pytest.mark.parametrize("way", ["merge", "wide"])
def test_against_finite_differences(kind, way):
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors).requires_grad_()
    (grad,) = torch.autograd.grad(scalar(weights.forward(base, inputs, vectors, c, way=way)), c)
    step = 1e-5
    with torch.no_grad():
        for seed in range(3):
            along = torch.randn(c.shape, generator=torch.Generator().manual_seed(seed), dtype=c.dtype)
            up, down = (scalar(weights.naive.forward(base, inputs, vectors, c + s * along)) for s in (step, -step))
            slope = (up - down) / (2 * step)
            assert abs((grad * along).sum() - slope) <= 1e-6 * max(1, abs(slope), grad.abs().sum())


@networks
@pytest.mark.parametrize("way", ["auto", "merge", "wide"])
def test_against_the_loop(kind, way):
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors).requires_grad_()
    if kind is Tied:
        inputs = inputs.clamp_min(1)  # torch gives the padding's row no gradient, whatever it does to the answer
    given = [c, inputs.requires_grad_()] if inputs.is_floating_point() else [c]
    got = torch.autograd.grad(scalar(weights.forward(base, inputs, vectors, c, way=way)), given)
    want = torch.autograd.grad(scalar(weights.naive.forward(base, inputs, vectors, c)), given)
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= 1e-11 * y.abs().max()


@pytest.mark.parametrize("way", ["low_rank", "merge"])
@pytest.mark.parametrize("kind", [Vision, Tied])
def test_low_rank(kind, way):
    base, tuned, inputs = setting(kind)
    inputs = inputs.clamp_min(1) if kind is Tied else inputs
    vectors = weights.task_vectors(base, *tuned).low_rank(2)
    c = draw(vectors).requires_grad_()
    (got,) = torch.autograd.grad(scalar(weights.forward(base, inputs, vectors, c, way=way)), c)
    (want,) = torch.autograd.grad(scalar(weights.naive.forward(base, inputs, vectors, c)), c)
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("kind", [Vision, Convolutions, Attention])
def test_one_merge(kind):
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors)[0].requires_grad_()
    (got,) = torch.autograd.grad(scalar(weights.forward(base, inputs, vectors, c)), c)
    each = c.expand(len(inputs), -1, -1)
    (want,) = torch.autograd.grad(scalar(weights.naive.forward(base, inputs, vectors, each)), c)
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@networks
def test_the_models_own_weights_get_none(kind):
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    frozen = next(base.parameters()).requires_grad_(False)
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in base.named_parameters()}
    for c in (draw(vectors), draw(vectors)[0]):
        scalar(weights.forward(base, inputs, vectors, c.requires_grad_())).backward()
        assert c.grad is not None
    assert not frozen.requires_grad
    for name, p in base.named_parameters():
        assert p.grad is None
        assert (id(p), p.requires_grad) == before[name][:2]
        assert torch.equal(p, before[name][2])
