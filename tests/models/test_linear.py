"""Linear layers by oneDNN: the same numbers to rounding, only where that is allowed, and gone afterwards."""

import pytest
import torch
from torch import nn

import models
from models import zoo
from models.linear import onednn_layers, onednn_linear

SIZES = [(1, 1, 1), (1, 48, 97), (3, 7, 5), (33, 65, 31), (130, 96, 48)]


@pytest.fixture
def calls(monkeypatch):
    """Counts the layers that were multiplied by oneDNN."""
    made = []
    operation = torch.ops.mkldnn._linear_pointwise

    def count(*args):
        made.append(args[0].shape)
        return operation(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    monkeypatch.setattr("models.linear.current", models.calls.Call)  # as within a call of ours
    return made


def layer_and_input(n, width, out, bias, batched, random):
    layer = nn.Linear(width, out, bias=bias)
    return layer, torch.randn(*((2, n) if batched else (n,)), width, generator=random)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_torch(random, calls, sizes, bias, batched):
    layer, x = layer_and_input(*sizes, bias, batched, random)
    want = nn.functional.linear(x, layer.weight, layer.bias).detach()
    with torch.no_grad(), onednn_linear([layer]):
        got = layer(x)
    assert calls == [x.shape]
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5


def test_transposed_input(random, calls):
    layer = nn.Linear(9, 5)
    x = torch.randn(9, 4, generator=random).T
    with torch.no_grad(), onednn_linear([layer]):
        got = layer(x)
    assert calls
    assert (got - nn.functional.linear(x, layer.weight, layer.bias)).abs().max() <= 1e-5


def test_not_where_gradients_are_recorded(random, calls):
    layer, x = layer_and_input(3, 7, 5, True, False, random)
    with onednn_linear([layer]):
        layer(x).sum().backward()
    assert not calls
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_untouched(random, calls, dtype):
    layer, x = layer_and_input(3, 7, 5, True, False, random)
    layer, x = layer.to(dtype), x.to(dtype)
    with torch.no_grad():
        want = layer(x)
        with onednn_linear([layer]):
            assert torch.equal(layer(x), want)
    assert not calls


def test_no_rows(calls):
    """What a prefill projects to the vocabulary: nothing."""
    layer = nn.Linear(7, 5)
    with torch.no_grad(), onednn_linear([layer]):
        assert layer(torch.zeros(1, 0, 7)).shape == (1, 0, 5)
    assert not calls


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_exception(error):
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]

    def call():
        with torch.no_grad(), onednn_linear(layers):
            assert all("forward" in layer.__dict__ for layer in layers)
            raise error

    with pytest.raises(error):
        call()
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_layers_wrapped_by_others_are_left_alone(calls):
    layer = nn.Linear(2, 2)
    theirs = lambda x: x + 1  # noqa: E731
    layer.forward = theirs
    with torch.no_grad(), onednn_linear([layer]):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))
    assert layer.forward is theirs
    assert not calls


def test_which_layers():
    """Plain linear layers only: a subclass may compute something else."""

    class Other(nn.Linear):
        pass

    plain = nn.Linear(2, 2)
    assert onednn_layers([plain, Other(2, 2), nn.Conv1d(1, 1, 1)]) == [plain]


def test_used_by_every_forward_of_a_model(calls):
    model = models.wrap(zoo.tiny("llama"))
    with torch.no_grad():
        model.forward(torch.tensor([[1, 2, 3]]))
    assert len(calls) == 3 * 7 + 1  # q, k, v, o and three of the MLP a layer, and the vocabulary
