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
from engine.core import capabilities, checking
from models import Capabilities, tiny

REFUSED = {  # families that do not go through the attention interface; that are not causal; that cross-attend
    "gptj": {"packed", "layered"},
    "falcon": {"packed", "layered"},
    "falcon_alibi": {"packed", "layered"},
    "bloom": {"packed", "layered"},
    "paligemma": {"packed", "expanded", "layered"},
    "mllama": {"packed", "expanded", "layered"},
}


# Near relatives of others that are looked at.
RELATIVES = (
    "qwen3", "mistral",
    "mixtral", "olmo2", "qwen2", "opt", "gpt_neox", "phi3", "falcon_alibi", "gemma3", "llava_onevision", "idefics2",
    "smolvlm", "qwen2_vl", "qwen3_vl", "internvl",
)  # fmt: skip
EVERY = [pytest.param(f, marks=[pytest.mark.slow] * (f in RELATIVES)) for f in (*tiny.TEXT, *tiny.IMAGE_TEXT)]


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for
@pytest.mark.parametrize("family", EVERY)
def test_exact_or_refused(family):
    found = list(cells(family))
    assert {cell.strategy for cell in found if cell.refused} == REFUSED.get(family, set())
    for cell in found:
        assert cell.refused or cell.exact, cell
    assert family in markdown(found)


def unruly():
    """PaliGemma with the rule that refuses it taken away."""
    model = wrapped("paligemma")
    model._ruled_of = lambda body: Capabilities()
    return model


def test_what_the_rules_miss_is_found(draw):
    model = unruly()
    heads, values = draw(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = engine.patch(model, "Q: which?\nA:", heads=heads, values=values)
    first, second = (str(one.message) for one in said if "from now on" in str(one.message))
    assert re.search("rows are not packed from now on, its code reads the attention mask", first)
    assert re.search(r"do not go on from its cache.* off the naive ones by \d", second)
    torch.testing.assert_close(
        got, engine.naive.patch(model, "Q: which?\nA:", heads=heads, values=values), atol=1e-5, rtol=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        engine.patch(model, "Q: which?\nA:", heads=heads, values=values)


@pytest.mark.parametrize(("strategy", "why"), [("packed", "reads the attention mask"), ("expanded", "off the naive")])
@pytest.mark.filterwarnings("ignore:paligemma. rows are not packed")
def test_a_named_strategy_that_is_wrong_raises(draw, strategy, why):
    model = unruly()
    heads, values = draw(model)
    with pytest.raises(models.UnsupportedModelError, match=f"'{strategy}' is not exact on paligemma.* {why}"):
        engine.patch(model, "Q: which?\nA:", heads=heads, values=values, strategy=strategy)
    assert not capabilities.known(model).can.why_not(strategy)


def test_compared_once_a_model_and_length(draw, monkeypatch):
    """Again for a prompt of more than twice the length, another model, another state; not for shorter ones."""
    compared = []
    compare = checking._compare
    monkeypatch.setattr(
        checking, "_compare", lambda m, probes, way, *rest: (compared.append(way), compare(m, probes, way, *rest))[1]
    )
    model = wrapped("llama")
    heads, values = draw(model)

    def new(n_tokens, model=model):
        compared.clear()
        engine.patch(model, list(range(n_tokens)), heads=heads, values=values)
        return list(compared)

    assert new(10) == ["packed", "batch"]
    assert new(5) == new(10) == new(20) == []
    assert new(21) == ["packed", "batch"]
    assert new(10, wrapped("llama")) == ["packed", "batch"]  # another model of the class
    handle = model.hf.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert new(10) == new(11) == ["packed", "batch"]  # with hooks of others: at every greater length
    handle.remove()
    assert new(10) == ["packed", "batch"]
    model.hf.set_attn_implementation("eager")
    assert new(10) == ["packed", "batch"]
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert new(10) == ["packed", "batch"]


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
    options = dict(
        heads=heads, values=values, positions=positions, mode=data.draw(st.sampled_from(["replace", "add", "scale"]))
    )
    strategy = data.draw(st.sampled_from(["auto", "packed", "expanded", "batch"]))
    got = engine.patch(model, prompts, strategy=strategy, **options)
    torch.testing.assert_close(got, engine.naive.patch(model, prompts, **options), atol=2e-5, rtol=0)
