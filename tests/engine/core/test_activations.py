"""Captured z is what a plain hook sees; means are the means of it, however many prompts of whatever lengths."""

import pytest
import torch

import engine
import models
from models import zoo
from models.calls import Passing
from tests.conftest import KINDS

PROMPTS = ["Q: hot\nA:", "a", "Q: big\nA: small\n\nQ: up\nA:", "abc", "Q: hot\nA:", "xy" * 20, "Z"]


def raw_z(model, ids):
    """The input of every output projection, [tokens, layers, heads, head_dim], by hooks of plain torch."""
    hf, kept = model.hf, []
    if hasattr(hf, "transformer"):
        projections = [block.attn.c_proj for block in hf.transformer.h]
    else:
        projections = [block.self_attn.o_proj for block in hf.model.layers]
    handles = [p.register_forward_pre_hook(Passing(lambda _, args: kept.append(args[0][0]))) for p in projections]
    with torch.no_grad():
        hf(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack([z.unflatten(-1, (model.shape.n_heads, -1)) for z in kept], dim=1)


def near(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5


@pytest.fixture(params=[4096, 12])
def room(request, monkeypatch):
    """Tokens that one forward takes: all prompts, or not even the longest one."""
    monkeypatch.setattr("engine.core.activations.MAX_TOKENS", request.param)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("family", KINDS)
def test_last_token(tiny, family):
    model = tiny(family)
    want = torch.stack([raw_z(model, model.encode(p))[-1] for p in PROMPTS])
    near(engine.capture(model, PROMPTS), want)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("positions", [0, 2, -3, [0], [-1], [-1, 0], [2, -3, 0, -1], [1, 1]])
@pytest.mark.parametrize("family", KINDS)
def test_positions(tiny, family, positions):
    """One position gives [N, L, H, D], a list of P gives [N, P, L, H, D], in the order asked for."""
    model = tiny(family)
    prompts = [p for p in PROMPTS if len(p) > 2]
    want = torch.stack([raw_z(model, model.encode(p))[positions] for p in prompts])
    near(engine.capture(model, prompts, positions), want)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("family", KINDS)
def test_means(tiny, family):
    model = tiny(family)
    means = engine.mean_activations(model, PROMPTS, progress=False)
    assert means.dtype == torch.float32
    near(means, engine.capture(model, PROMPTS).mean(dim=0))
    near(means, torch.stack([raw_z(model, model.encode(p))[-1] for p in PROMPTS]).mean(dim=0))


def test_prompts_from_a_generator(model):
    """Any iterable will do, and is walked through once."""
    want = engine.mean_activations(model, PROMPTS, progress=False)
    assert torch.equal(engine.mean_activations(model, (p for p in PROMPTS), progress=False), want)
    assert torch.equal(engine.capture(model, iter(PROMPTS)), engine.capture(model, PROMPTS))


def test_prompts_of_many_kinds(model):
    ids = model.encode("abc")
    z = engine.capture(model, ["abc", ids, ids.tolist(), ids.int()])
    near(z, z[:1].expand(4, -1, -1, -1))


def test_prompts_share_forwards(model):
    """Packed: seven prompts are one forward, unless they do not fit."""
    runs = []
    handle = model.hf.register_forward_pre_hook(Passing(lambda *_: runs.append(1)))
    try:
        engine.capture(model, PROMPTS)
    finally:
        handle.remove()
    assert len(runs) == 1


def test_activations_that_are_not_finite(tiny):
    """Means of NaN would be a task vector of nothing: refused."""
    model = models.wrap(zoo.tiny("llama"))
    with torch.no_grad():
        model.hf.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    expected = pytest.raises(ValueError, match="LlamaForCausalLM gives NaN or infinite activations")
    with pytest.warns(UserWarning, match="no way can be compared"), expected:
        engine.mean_activations(model, [[1, 2, 3]], progress=False)


def test_progress_goes_to_standard_error(model, capsys):
    engine.mean_activations(model, PROMPTS, progress=True)
    assert capsys.readouterr().out == ""


def test_no_graph_is_kept(model):
    assert not engine.capture(model, PROMPTS).requires_grad
    assert not engine.mean_activations(model, PROMPTS, progress=False).requires_grad


def test_half_precision_is_averaged_in_float64():
    model = models.wrap(zoo.tiny("llama").bfloat16(), zoo.tiny_tokenizer())
    z = engine.capture(model, PROMPTS)
    assert z.dtype == torch.bfloat16
    means = engine.mean_activations(model, PROMPTS, progress=False)
    assert torch.equal(means, z.double().mean(dim=0).float())
