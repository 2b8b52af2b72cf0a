"""Linear layers by oneDNN: the same numbers to rounding, only where that is allowed, and gone afterwards."""

import pytest
import torch
from torch import nn

import engine
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


@pytest.mark.parametrize("cut", [lambda w: w[:, :7], lambda w: w[::2], lambda w: w[:, 2:9]])
def test_parts_of_larger_weights_are_multiplied_by_torch(random, calls, cut):
    """By them oneDNN is a thousand times slower."""
    part = cut(torch.randn(6, 9, generator=random))
    layer, x = nn.Linear(part.shape[1], part.shape[0]), torch.randn(3, part.shape[1], generator=random)
    layer.weight = nn.Parameter(part)
    assert layer.weight.stride() == part.stride()
    with torch.no_grad(), onednn_linear([layer]):
        got = layer(x)
    assert not calls
    assert torch.equal(got, nn.functional.linear(x, part, layer.bias))


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


@pytest.fixture
def tiny_llama():
    hf = zoo.tiny("llama")
    return hf, models.wrap(hf, name="tiny")


def rows_of(model):
    """Logits of four rows with random heads replaced by random values."""
    shape, random = model.shape, torch.Generator().manual_seed(0)
    masks = torch.rand(4, shape.n_layers, shape.n_heads, generator=random) < 0.5
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    return engine.patch(model, list(range(1, 40)), heads=masks, values=values)


def test_reordered_weights_give_the_same_bits(tiny_llama, monkeypatch):
    model = tiny_llama[1]
    plain, kinds, operation = rows_of(model), [], torch.ops.mkldnn._linear_pointwise

    def look(x, weight, *more):
        kinds.append(weight.is_mkldnn)
        return operation(x, weight, *more)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", look)
    with models.reordered(model):
        assert torch.equal(rows_of(model), plain)
        assert kinds
        assert all(kinds)
        kinds.clear()
        other = models.wrap(zoo.tiny("gpt2"), name="other")
        rows_of(other)
        assert not any(kinds)
    kinds.clear()
    assert torch.equal(rows_of(model), plain)
    assert not any(kinds)


def test_reordered_weights_that_are_written_or_replaced_are_not_used(tiny_llama):
    hf, model = tiny_llama
    layer, found = hf.model.layers[0].mlp.down_proj, []
    kept = layer.weight.detach().clone()
    with models.reordered(model):
        found.append(rows_of(model))
        with torch.no_grad():
            layer.weight.mul_(3)
        found.append(rows_of(model))
        layer.weight = nn.Parameter(kept / 2)
        found.append(rows_of(model))
    for logits, times in zip(found, (1, 3, 0.5), strict=True):
        layer.weight = nn.Parameter(kept * times)
        assert torch.equal(rows_of(model), logits)


def test_reordered_weights_written_unseen_are_found_at_the_end(tiny_llama):
    hf, model = tiny_llama
    with pytest.raises(RuntimeError, match=r"through \.data"), models.reordered(model):
        hf.lm_head.weight.data[3, 2] += 1
    with models.reordered(model):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_reordered_weights_give_one_token_the_same_bits(tiny, family):
    """A prompt of one token, rows on a prefix, and the last token, at which alone the vocabulary is read."""
    model = tiny(family)
    means = torch.randn(model.shape.n_layers, model.shape.n_heads, model.shape.head_dim)
    prefix = engine.prefill(model, list(range(9)))

    def ask():
        asked = dict(heads=[(1, 2)], values=means)
        return [engine.patch(model, one, **asked) for one in ([5], list(range(9)), prefix)]

    want = ask()
    try:
        with models.reordered(model):
            got = ask()
    except models.UnsupportedModelError:
        assert family == "gpt2"  # its layers are no linear ones, but the vocabulary's
        return
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_reordered_weights_with_nan_are_not_taken_for_written(tiny_llama):
    model = tiny_llama[1]
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with models.reordered(model):
        pass


def test_what_cannot_be_reordered_is_refused():
    half = models.wrap(zoo.tiny("llama").to(torch.bfloat16), name="half")
    with pytest.raises(models.UnsupportedModelError, match="float32 weights on the CPU"), models.reordered(half):
        pass
