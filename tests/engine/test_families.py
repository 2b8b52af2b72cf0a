"""Every family of the table is exact, or refuses with a reason; the net under the rules holds."""

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
import models
from bench.families import cells, markdown, wrapped
from engine import checking
from models import tiny

REFUSED = {  # families that do not go through the attention interface; that are not causal; that cross-attend
    "gptj": {"packed", "layered"},
    "falcon": {"packed", "layered"},
    "falcon_alibi": {"packed", "layered"},
    "bloom": {"packed", "layered"},
    "paligemma": {"packed", "expanded", "layered"},
    "mllama": {"packed", "expanded", "layered"},
}


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for
@pytest.mark.parametrize("family", [*tiny.TEXT, *tiny.IMAGE_TEXT])
def test_exact_or_refused(family):
    found = list(cells(family))
    assert {cell.strategy for cell in found if cell.refused} == REFUSED.get(family, set())
    for cell in found:
        assert cell.refused or cell.exact, cell
    assert family in markdown(found)


@pytest.fixture
def forgetful(monkeypatch):
    """The verdicts of this test are its own."""
    monkeypatch.setattr(checking, "_differences", {})


def unruly():
    """PaliGemma with the rule that refuses it taken away."""
    model = wrapped("paligemma")
    model.sharing_refused = model.packing_refused = ""
    return model


def test_what_the_rules_miss_is_found(draw, forgetful):
    model = unruly()
    heads, values = draw(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = engine.patch(model, "Q: which?\nA:", heads=heads, values=values)
    first, second = (str(one.message) for one in said if "from now on" in str(one.message))
    assert "rows are not packed" in first
    assert re.search(r"no prefix is shared.* off the naive one by \d", second)
    torch.testing.assert_close(
        got, engine.naive.patch(model, "Q: which?\nA:", heads=heads, values=values), atol=1e-5, rtol=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        engine.patch(model, "Q: which?\nA:", heads=heads, values=values)


@pytest.mark.parametrize("strategy", ["packed", "expanded"])
def test_a_named_strategy_that_is_wrong_raises(draw, forgetful, strategy):
    model = unruly()
    heads, values = draw(model)
    with pytest.raises(models.UnsupportedModelError, match=f"'{strategy}' is not exact on paligemma.* off the naive"):
        engine.patch(model, "Q: which?\nA:", heads=heads, values=values, strategy=strategy)
    assert not model.packing_refused


def test_checked_once_an_architecture(draw, forgetful):
    runs = []
    for _ in range(2):
        model = wrapped("llama")
        handle = model.hf.register_forward_pre_hook(lambda *_: runs.append(1))
        for _ in range(2):
            heads, values = draw(model)
            engine.patch(model, "Q: which?\nA:", heads=heads, values=values)
        handle.remove()
    assert len(runs) == 4 + 2  # four patches; one naive and one packed row


def test_declared_projections(draw):
    """An architecture unknown here works once its output projections are named."""
    hf = tiny.tiny("llama")
    for layer in hf.model.layers:
        layer.self_attn.mixer = layer.self_attn.o_proj
        type(layer.self_attn).__getattr__ = torch.nn.Module.__getattr__
    paths = [f"model.layers.{i}.self_attn.mixer" for i in range(3)]
    declared, found = models.wrap(hf, projections=paths), models.wrap(hf)
    heads, values = draw(found)
    torch.testing.assert_close(
        engine.patch(declared, [5, 6, 7], heads=heads, values=values),
        engine.patch(found, [5, 6, 7], heads=heads, values=values),
    )


MODELS = {family: wrapped(family) for family in ("qwen3", "gemma2", "gpt2")}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_request_agrees_with_naive(data):
    """Masks, positions, lengths, rows, prompts and modes at random, over three families."""
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
    shape = model.shape
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    rows = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    prompts = [torch.randint(97, (n,), generator=random).tolist() for n in lengths]
    positions = data.draw(st.lists(st.integers(-min(lengths), min(lengths) - 1), min_size=1, max_size=4))
    heads = torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < data.draw(st.floats(0, 1))
    lead = (rows,) if data.draw(st.booleans()) else ()
    values = torch.randn(*lead, shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    options = dict(heads=heads, values=values, positions=positions, mode=data.draw(st.sampled_from(["replace", "add"])))
    strategy = data.draw(st.sampled_from(["auto", "packed", "expanded", "batch"]))
    got = engine.patch(model, prompts, strategy=strategy, **options)
    torch.testing.assert_close(got, engine.naive.patch(model, prompts, **options), atol=2e-5, rtol=0)
