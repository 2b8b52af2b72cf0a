"""A model that is not the one that was wrapped: layers, modules, weights changed since, adapters, compiled."""

import copy
import warnings
from itertools import pairwise

import peft
import pytest
import torch
from torch import nn

import engine
from bench.survey import apart
from models import UnsupportedModelError, zoo
from tests.unmet import IDS, LIMIT, by_hooks, exact, given, packs, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 0, 1), (1, 2)])
def test_layers_put_in_another_order(order):
    hf = zoo.tiny("gpt2")
    model = wrapped(hf)
    exact(model)
    hf.transformer.h = nn.ModuleList([hf.transformer.h[i] for i in order])
    hf.config.num_hidden_layers = len(order)
    assert model.shape.n_layers == len(order)
    alone = zoo.tiny("gpt2")  # the same, but no block stands in it twice
    alone.transformer.h = nn.ModuleList([copy.deepcopy(hf.transformer.h[i]) for i in range(len(order))])
    alone.config.num_hidden_layers = len(order)
    hf.config.use_cache = alone.config.use_cache = False  # by which a plain forward would mix up their keys
    asked = given(model)
    want = by_hooks(wrapped(alone), IDS, **asked)
    assert apart(engine.patch(model, IDS, **asked), want) <= LIMIT
    assert apart(engine.patch(model, engine.prefill(model, IDS), **asked), want) <= LIMIT
    assert apart(engine.naive.patch(model, IDS, **asked), want) <= LIMIT
    assert packs(model)
    with pytest.raises(UnsupportedModelError, match="a cache would mix them up"):
        engine.patch(model, IDS, strategy="expanded", **given(model))


def test_modules_replaced_later():
    """A prefix computed before is computed again, and says so; the projection of heads is the new one's."""
    model = wrapped(zoo.tiny("gpt2"))
    prefix = engine.prefill(model, IDS)
    exact(model)
    attention = model.hf.transformer.h[1].attn
    attention.c_proj = nn.Linear(40, 40)
    exact(model)
    with pytest.warns(UserWarning, match="has changed since a prefix was computed"):
        exact(model, prefix)
    z = torch.randn(5, 8)
    alone = torch.block_diag(*z)  # [heads, heads * head_dim]
    want = alone @ attention.c_proj.weight.mT
    torch.testing.assert_close(model.project(1, z), want, atol=1e-5, rtol=0)


def test_weights_changed_in_place():
    model = wrapped(zoo.tiny("llama"))
    pool = engine.PrefixPool(model, [IDS])
    prefix = pool[0]
    exact(model, prefix)
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="computed again"):
        exact(model, prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact(model, pool[0])


def test_adapters():
    """Of peft: added, switched off, switched, merged; those that put in tokens are refused."""
    hf = zoo.tiny("llama")
    before = wrapped(hf)
    exact(before)
    options = dict(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(hf, peft.LoraConfig(**options))
    lora.add_adapter("other", peft.LoraConfig(**options))
    model = wrapped(lora)
    plain = lora(input_ids=torch.tensor([IDS])).logits[0, -1]
    assert apart(engine.patch(model, IDS)[0], plain) <= LIMIT
    seen = []

    def looks():
        exact(model)
        exact(before)  # wrapped before there were adapters
        assert packs(model)
        seen.append(engine.patch(model, IDS)[0])

    looks()
    lora.set_adapter("other")
    looks()
    with lora.disable_adapter():
        looks()
    assert apart(seen[-1], wrapped(zoo.tiny("llama")).forward(torch.tensor([IDS]))[0]) <= LIMIT
    z = torch.randn(6, 8)
    projection = hf.model.layers[2].self_attn.o_proj
    torch.testing.assert_close(model.project(2, z), projection(torch.block_diag(*z)), atol=1e-5, rtol=0)
    lora.merge_adapter()
    looks()
    assert all(apart(a, b) > 1e-3 for a, b in pairwise(seen[:3]))
    assert apart(seen[3], seen[1]) <= LIMIT
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    learned = peft.get_peft_model(zoo.tiny("llama"), prompts)
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING puts tokens of its own"):
        wrapped(learned)


@pytest.mark.parametrize("how", ["whole", "in place", "blocks"])
def test_compiled_models_run_as_written(how):
    """Compiled code would not look at hooks put in after it."""
    hf = zoo.tiny("llama")
    asked = given(wrapped(hf))
    want = by_hooks(wrapped(zoo.tiny("llama")), IDS, **asked)
    model = hf
    if how == "whole":
        model = torch.compile(hf, backend="eager")
    elif how == "in place":
        hf.compile(backend="eager")
    else:
        for layer in range(3):
            hf.model.layers[layer] = torch.compile(hf.model.layers[layer], backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(input_ids=torch.tensor([IDS]))  # compiled now
    for strategy in ("packed", "batch", "naive"):
        assert apart(engine.patch(wrapped(model), IDS, strategy=strategy, **asked), want) <= LIMIT


class Packed4(nn.Module):
    """A linear layer whose weight is stored in another shape, as 4-bit weights are."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().reshape(-1, 1))

    def forward(self, x):
        return x @ self.weight.view(self.out_features, self.in_features).mT


def test_weights_stored_in_other_shapes():
    hf = zoo.tiny("llama")
    for layer in hf.model.layers:
        layer.self_attn.o_proj = Packed4(layer.self_attn.o_proj)
    model = wrapped(hf)
    assert model.shape == wrapped(zoo.tiny("llama")).shape
    asked = given(model)
    assert apart(engine.patch(model, IDS, **asked), by_hooks(wrapped(zoo.tiny("llama")), IDS, **asked)) <= LIMIT
    z = torch.randn(6, 8)
    torch.testing.assert_close(model.project(0, z), wrapped(zoo.tiny("llama")).project(0, z), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_that_share_a_scale():
    """Dynamic int8 takes one scale of all that goes through a layer: rows beside each other change each other."""
    model = wrapped(zoo.tiny("llama"))
    exact(model)
    torch.ao.quantization.quantize_dynamic(model.hf.model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    asked = given(model)
    got = engine.patch(model, IDS, **asked)
    plan = engine.plan(model, IDS, rows=4)
    assert plan.strategy == "naive"
    assert "scale all that goes through them" in plan.reason
    assert torch.equal(got, engine.naive.patch(model, IDS, **asked))
