"""Rows that come in at their first patched layer are those of naive, and the blocks before never see them."""

import pytest
import torch

import engine
import models
from engine.core import capabilities, checking
from engine.core.patching import decide, request
from engine.core.reading import read_patches
from models import UnsupportedModelError, zoo
from models.calls import Passing
from tests.conftest import quick

LIMIT = 1e-5
FAMILIES = ("llama", "gpt2", "qwen3", "mistral", "gemma2", "opt", "gpt_neox", "phi3", "olmo2")


def one_head_each(model, rows, random):
    """Rows of one patched head each, in no order of layers, and one row of none."""
    shape = model.shape
    heads = torch.zeros(rows, shape.n_layers, shape.n_heads, dtype=torch.bool)
    for row in heads[1:]:
        row[torch.randint(shape.n_layers, (), generator=random), torch.randint(shape.n_heads, (), generator=random)] = (
            True
        )
    return heads


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("positions", [-1, [-3, -1]])
@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "gpt2", "gemma2"))
def test_equals_naive(tiny, draw, random, family, positions, per_row):
    model = tiny(family)
    heads = one_head_each(model, 9, random)
    values = draw(model, rows=9, per_row=per_row)[1]
    for tokens in (4, 13, 65):
        ids = torch.randint(97, (tokens,), generator=random)
        for prompt in (ids, engine.prefill(model, ids, positions)):
            for mode in ("replace", "add"):
                options = dict(heads=heads, values=values, positions=positions, mode=mode)
                got = engine.patch(model, prompt, strategy="layered", **options)
                torch.testing.assert_close(got, engine.naive.patch(model, prompt, **options), atol=LIMIT, rtol=0)


def test_in_float64(draw, random):
    model = models.wrap(zoo.tiny("llama").double())
    heads = one_head_each(model, 9, random)
    options = dict(heads=heads, values=draw(model)[1])
    got = engine.patch(model, list(range(40)), strategy="layered", **options)
    torch.testing.assert_close(got, engine.naive.patch(model, list(range(40)), **options), atol=1e-12, rtol=0)


def test_several_passes(model, random, draw, monkeypatch):
    heads, values = one_head_each(model, 9, random), draw(model)[1]
    want = engine.patch(model, list(range(30)), heads=heads, values=values, strategy="layered")
    monkeypatch.setattr("engine.core.planning.MAX_TOKENS", 4)
    got = engine.patch(model, list(range(30)), heads=heads, values=values, strategy="layered")
    torch.testing.assert_close(got, want, atol=LIMIT, rtol=0)


def test_gradients(model, random, draw):
    heads, values = one_head_each(model, 9, random), draw(model)[1]
    found = []
    for strategy in ("layered", "naive"):
        leaf = values.clone().requires_grad_()
        engine.patch(model, list(range(11)), heads=heads, values=leaf, strategy=strategy).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_rows_stay_out_of_earlier_blocks(model):
    """Of a head in the last layer, the blocks before see one row only."""
    shape, seen = model.shape, []
    heads = torch.zeros(6, shape.n_layers, shape.n_heads, dtype=torch.bool)
    heads[:3, -1, 0], heads[3:, 1, 0] = True, True
    prefix = engine.prefill(model, list(range(12)))
    hook = Passing(lambda _, args: seen.append(args[0].shape[1]))
    handles = [block.mlp.register_forward_pre_hook(hook) for block in model.body.blocks]
    try:
        engine.patch(model, prefix, heads=heads, values=torch.zeros(shape.n_layers, shape.n_heads, shape.head_dim))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [1, *[4] * (shape.n_layers - 2), 7]


def test_auto_takes_it_where_it_saves(model, random):
    late = torch.zeros(50, model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    late[:, -1, 0] = True
    prompt = engine.core.prefix.as_prefix(model, list(range(20)))
    values = torch.zeros(model.shape.n_layers, model.shape.n_heads, model.shape.head_dim)
    patches = [read_patches(model, heads=heads, values=values) for heads in (late, torch.ones_like(late))]
    chosen = [
        decide(model, [prompt], [request(prompt, patch, [19], patch.first_layers())], "auto") for patch in patches
    ]
    assert [plan[0].strategy for plan in chosen] == ["layered", "packed"]
    assert chosen[0][0].n_computed < chosen[1][0].n_computed


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_other_backends_refuse_by_name_and_pack_by_auto(random, draw, backend):
    from bench.families import wrapped

    model = wrapped("llama", torch.float32, backend)
    options = dict(heads=one_head_each(model, 9, random), values=draw(model)[1])
    with pytest.raises(UnsupportedModelError, match="layered"):
        engine.patch(model, list(range(9)), strategy="layered", **options)
    got = engine.patch(model, list(range(9)), **options)
    torch.testing.assert_close(got, engine.naive.patch(model, list(range(9)), **options), atol=LIMIT, rtol=0)


def test_a_model_on_which_it_is_wrong(random, draw, monkeypatch):
    """The first-time check sees it: auto warns and packs, a named strategy raises."""
    model = models.wrap(zoo.tiny("llama"))
    compare = checking._compare
    monkeypatch.setattr(
        checking, "_compare", lambda m, p, way, *rest: "so" if way == "layered" else compare(m, p, way, *rest)
    )
    heads = torch.zeros(50, model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    heads[:, -1, 0] = True
    options = dict(heads=heads, values=draw(model)[1])
    with pytest.raises(UnsupportedModelError, match="layered"):
        engine.patch(model, list(range(9)), strategy="layered", **options)
    with pytest.warns(UserWarning, match="layer by layer"):
        got = engine.patch(model, list(range(9)), **options)
    assert capabilities.known(model).can.layered == "so"
    torch.testing.assert_close(got, engine.naive.patch(model, list(range(9)), **options), atol=LIMIT, rtol=0)
