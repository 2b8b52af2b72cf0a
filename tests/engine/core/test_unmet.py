"""Models and uses that break fast ways: exact, or refused in words. The oracle hooks transformers' own model."""

import copy
import threading
import time
import warnings
from collections import Counter
from itertools import pairwise

import peft
import pytest
import torch
import transformers
from torch import nn

import engine
import models
from bench import architectures
from bench.survey import apart, capture, generated, look, oracle
from engine.core import capabilities
from models import UnsupportedModelError, zoo

IDS = list(range(1, 31))
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LIMIT = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def random_(hf):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models.tiny._randomize(hf)
    return hf.eval()


def wrapped(hf, name="new"):
    return models.wrap(hf, zoo.tiny_tokenizer(), name=name)


def given(model, rows=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    s = model.shape
    heads = torch.rand(rows, s.n_layers, s.n_heads, generator=random) < 0.4
    return dict(heads=heads, values=torch.randn(s.n_layers, s.n_heads, s.head_dim, generator=random))


def by_hooks(model, ids, heads, values, positions=(-1,)):
    return torch.stack([oracle(model, model.hf, list(ids), row, values, positions) for row in heads])


def exact(model, ids=IDS, strategy="auto", **options):
    """One prompt against the oracle."""
    asked = given(model) | options
    got = engine.patch(model, ids, strategy=strategy, **asked)
    want = by_hooks(model, ids if isinstance(ids, list) else ids.tokens.tolist(), **asked)
    assert apart(got, want) <= LIMIT


def packs(model):
    return engine.plan(model, IDS, rows=4).strategy == "packed"


# What the attention is told.


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        ("granite_swa", "packed"),  # sinks, windows
        ("llama4_text", "packed"),  # chunks, scales by place
        ("minicpm3", "packed"),  # values narrower than queries
        ("gemma3n_text", "packed"),  # keys of other layers
        ("gemma4_text", "packed"),  # heads of several sizes, too
        ("doge", "expanded"),  # a mask made by the model
        ("diffllama", "expanded"),  # attends twice in a layer
        ("deepseek_v32", "batch"),  # sees chosen tokens
        ("jamba", "batch"),
        ("recurrent_gemma", "batch"),
        ("olmo_hybrid", "batch"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_architectures(architecture, way):
    """Lengths, positions, late heads, prompts together, prefixes, capture, generate."""
    found = look(architecture)
    assert found.right, found
    assert found.way == way, found
    if way != "packed":
        model = wrapped(architectures.build(architecture))
        with pytest.raises(UnsupportedModelError, match="'packed' is not exact"):
            engine.patch(model, IDS, strategy="packed", **given(model))


@pytest.mark.parametrize("first", [[5, 6], "row step", "prefix"])
def test_sinks_are_known_from_the_first_call(first):
    config = transformers.GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=7, layer_types=None
    )
    model = wrapped(random_(transformers.GptOssForCausalLM(config)))
    asked = given(model)
    if first == "row step":
        got = engine.RowStep(model, rows=4, context=64)(IDS, **asked)
        assert apart(got, by_hooks(model, IDS, **asked)) <= LIMIT
    elif first == "prefix":
        exact(model, engine.prefill(model, IDS))
    else:
        exact(model, first)
    assert packs(model)


def test_sinks_in_half_precision():
    """No further from float64 than twice what plain forwards are."""
    double = wrapped(architectures.build("granite_swa", torch.float64))
    half = wrapped(copy.deepcopy(double.hf).bfloat16())
    asked = given(double, rows=16)
    truth = by_hooks(double, IDS, **(asked | {"values": asked["values"].double()}))
    own = by_hooks(half, IDS, **(asked | {"values": asked["values"].bfloat16()})).double()
    got = engine.patch(half, IDS, **asked).double()
    assert packs(half)
    assert (got - truth).abs().max() <= 2 * (own - truth).abs().max()


def test_what_attention_is_told_and_is_not_known():
    model = wrapped(zoo.tiny("llama"))
    told = {"temperature": torch.tensor(2.0)}
    model.hf.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | told), with_kwargs=True
    )
    with pytest.warns(UserWarning, match="told temperature"):
        exact(model)
    assert not packs(model)


def test_windows_said_by_the_mask_alone():
    """Mixtral hands its attention no window; SDPA would not read it."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)
    model = wrapped(random_(transformers.MixtralForCausalLM(config)))
    exact(model, IDS[:4])
    exact(model)
    assert packs(model)


def test_attention_functions_of_others():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def every_other(module, q, k, v, mask, **kwargs):
        n, m = q.shape[2], k.shape[2]
        sees = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        sees[:, 1::2] &= torch.eye(n, m, dtype=torch.bool)[:, 1::2]
        return sdpa_attention_forward(module, q, k, v, sees[None, None], **kwargs)

    model = wrapped(zoo.tiny("llama"))
    exact(model)
    assert packs(model)
    transformers.AttentionInterface.register("every_other", every_other)
    model.hf.set_attn_implementation("every_other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact(model)
    assert "its attention 'every_other' is not one of transformers' own" in engine.plan(model, IDS, rows=4).reason
    model.hf.set_attn_implementation("eager")
    exact(model)
    assert packs(model)


# The length of the whole.


def growing(kind):
    if kind == "dynamic":
        rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
        config = transformers.LlamaConfig(**(SIZES | dict(max_position_embeddings=16)), rope_parameters=rope)
        return wrapped(random_(transformers.LlamaForCausalLM(config)))
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0])
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=rope)
    return wrapped(random_(transformers.Phi3ForCausalLM(config)))


def fresh(model, ids, heads, values):
    """What a model would say that has seen nothing before."""
    return by_hooks(wrapped(copy.deepcopy(model.hf)), ids, heads, values)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tables_that_depend_on_the_length(kind):
    model = growing(kind)
    asked = given(model)
    prompts = [IDS[:10], IDS, IDS[:16], IDS[:17]]
    want = torch.stack([fresh(model, ids, **asked) for ids in prompts])
    assert apart(engine.patch(model, prompts, **asked), want) <= LIMIT
    for ids, rows in zip(prompts, want, strict=True):  # whatever came before
        assert apart(engine.patch(model, ids, **asked), rows) <= LIMIT
    plans = [engine.plan(model, ids, rows=4) for ids in prompts]
    assert [plan.strategy for plan in plans] == ["packed", "batch", "packed", "batch"]
    assert "more than 16 tokens" in plans[1].reason
    assert apart(engine.patch(model, engine.prefill(model, IDS[:16]), **asked), want[2]) <= LIMIT
    with pytest.raises(UnsupportedModelError, match="more than 16 tokens"):
        engine.prefill(model, IDS[:17])
    for ids, z in zip(prompts, engine.capture(model, prompts), strict=True):
        other = wrapped(copy.deepcopy(model.hf))
        assert apart(z, capture(other, other.hf, [ids])[0]) <= LIMIT
    if kind == "longrope":  # across the boundary
        assert generated(model, model.hf, IDS[:12], **asked) == 0
        long = engine.generate(model, "Q: which one?", max_new_tokens=8, **asked)
        assert long == engine.generate(model, "Q: which one?", max_new_tokens=8, strategy="naive", **asked)


# The model is not the one that was wrapped.


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


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("T5Config", "T5ForConditionalGeneration"),
        ("BartConfig", "BartForConditionalGeneration"),
        ("MarianConfig", "MarianMTModel"),
        ("WhisperConfig", "WhisperForConditionalGeneration"),
    ],
)
def test_encoder_decoders_are_refused(config, kind):
    small = dict(vocab_size=97, d_model=48, num_layers=3, encoder_layers=3, decoder_layers=3, pad_token_id=0)
    hf = getattr(transformers, kind)(getattr(transformers, config)(**small))
    with pytest.raises(UnsupportedModelError, match=f"{kind} is an encoder-decoder"):
        models.wrap(hf)


def test_a_vision_tower_as_deep_as_the_decoder():
    model = wrapped(architectures.build("git"))
    exact(model)
    asked = given(model)
    assert apart(engine.patch(model, IDS, **asked)[:1], engine.patch(model, IDS)) > 1e-3


def test_heads_that_no_forward_runs():
    hf = zoo.tiny("llama")
    hf.spare = nn.ModuleList(nn.ModuleDict({"o_proj": nn.Linear(48, 48)}) for _ in range(3))
    model = models.wrap(hf, projections=[f"spare.{i}.o_proj" for i in range(3)])
    with pytest.raises(UnsupportedModelError, match="patching has no effect"):
        engine.patch(model, IDS, **given(model))


# Hooks of others.

V = torch.linspace(-1, 1, 48)


def add_at(place):
    def change(h):
        if h.shape[1] > max(place, -place - 1):
            h[:, place] += V
        return h

    return change


HOOKS = {
    "last": add_at(-1),
    "fifth": add_at(5),
    "twenty-first": add_at(21),
    "by place": lambda h: h * torch.linspace(1, 2, h.shape[1])[:, None],
    "of neighbours": lambda h: h + 0.1 * h.roll(1, 1),
    "all alike": lambda h: h * 1.1,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("which", HOOKS)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_that_were_left_on(which, before):
    """Put on after the model was wrapped and used, or before."""
    model = wrapped(zoo.tiny("llama"))
    if not before:
        exact(model)
    model.hf.model.layers[1].register_forward_hook(lambda _, __, out: HOOKS[which](out.clone()))
    for ids in (IDS[:2], IDS[:6], IDS):
        exact(model, ids)
    asked = given(model)
    want = torch.stack([by_hooks(model, ids, **asked) for ids in (IDS[:9], IDS, IDS[3:])])
    assert apart(engine.patch(model, [IDS[:9], IDS, IDS[3:]], **asked), want) <= LIMIT
    assert apart(engine.capture(model, [IDS[:3], IDS]), capture(model, model.hf, [IDS[:3], IDS])) <= LIMIT
    assert generated(model, model.hf, IDS[:4], **asked) == 0
    assert model.foreign_hooks() == ["model.layers.1"]
    if which == "all alike":
        assert packs(model)


def test_refusals_say_who_carries_hooks():
    model = wrapped(zoo.tiny("llama"))
    model.hf.model.layers[2].register_forward_hook(lambda _, __, out: HOOKS["last"](out.clone()))
    with pytest.warns(
        UserWarning, match=r"rows are not packed.* off the naive.* hooks that others put on model.layers.2"
    ):
        engine.patch(model, IDS, **given(model))
    with pytest.raises(UnsupportedModelError, match="hooks that others put on"):
        engine.RowStep(models.wrap(model.hf), rows=4, context=64)(IDS, **given(model))


def test_a_prompt_that_overflows_says_nothing_of_others():
    """In float16: it is batched, with a warning, and the next one packs."""
    model = wrapped(zoo.tiny("llama").half())
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[5] = torch.inf
    with pytest.warns(UserWarning, match="no way can be compared"):
        engine.patch(model, [5, 6, 7, 8], **given(model))
    exact_half = engine.patch(model, IDS[6:], **given(model))
    assert packs(model)
    own = by_hooks(model, IDS[6:], **(given(model) | {"values": given(model)["values"].half()}))
    assert apart(exact_half, own) < 0.01


# Several callers at once.


def at_work(hf, wrappers, seconds, n_threads, alone):
    """Threads that patch by every strategy, and one that runs and differentiates the plain model beside them."""
    asked = [given(wrappers[0], seed=seed) for seed in range(n_threads)]
    want = [by_hooks(alone, IDS, **one) for one in asked]
    ids = torch.tensor([IDS])
    plain = alone.hf(input_ids=ids).logits
    tally, stop = Counter(), time.monotonic() + seconds

    def patching(i):
        while time.monotonic() < stop:
            for strategy in ("packed", "layered", "expanded", "batch", "naive"):
                try:
                    got = engine.patch(wrappers[i % len(wrappers)], IDS, strategy=strategy, **asked[i])
                    tally["right" if apart(got, want[i]) <= LIMIT else f"{strategy} wrong"] += 1
                except Exception as error:
                    tally[repr(error)] += 1

    def plainly():
        while time.monotonic() < stop:
            try:
                out = hf(input_ids=ids).logits
                gradient = torch.autograd.grad(out.sum(), hf.model.layers[0].self_attn.q_proj.weight)[0]
                tally["right" if apart(out, plain) <= LIMIT and gradient.any() else "plain wrong"] += 1
            except Exception as error:
                tally[repr(error)] += 1

    threads = [threading.Thread(target=patching, args=(i,)) for i in range(n_threads)]
    threads.append(threading.Thread(target=plainly))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


@pytest.mark.parametrize("n_threads", [2, 4])
@pytest.mark.parametrize("shared", ["one model", "two wrappers", "a config"])
def test_threads(n_threads, shared):
    """On one model; by two wrappers of it; on two models that share a config. The model is left as it was."""
    hf, other = zoo.tiny("llama"), zoo.tiny("llama")
    if shared == "a config":
        for module in other.modules():
            if hasattr(module, "config"):
                module.config = hf.config
    wrappers = {"one model": [wrapped(hf)], "two wrappers": [wrapped(hf), wrapped(hf)]}.get(
        shared, [wrapped(hf), wrapped(other)]
    )
    tally = at_work(hf, wrappers, 1.0, n_threads, wrapped(zoo.tiny("llama")))
    assert set(tally) == {"right"}, tally
    assert hf.config._attn_implementation == "sdpa"
    for module in (*hf.modules(), *other.modules()):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in module.__dict__
        assert not module.training


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("strategy", ["packed", "layered", "expanded", "batch", "naive"])
def test_calls_within_calls(strategy):
    """A hook of the caller's that patches, and runs, the very model."""
    model, alone = wrapped(zoo.tiny("llama")), wrapped(zoo.tiny("llama"))
    asked, inner = given(model), given(model, rows=3, seed=1)
    want, want_inner = by_hooks(alone, IDS, **asked), by_hooks(alone, IDS[:12], **inner)
    plain = alone.hf(input_ids=torch.tensor([IDS])).logits
    busy, worst = [], []

    def hook(*_):
        if not busy:
            busy.append(1)
            worst.append(apart(engine.patch(model, IDS[:12], **inner), want_inner))
            worst.append(apart(model.hf(input_ids=torch.tensor([IDS])).logits, plain))
            busy.clear()

    model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(hook)
    assert apart(engine.patch(model, IDS, strategy=strategy, **asked), want) <= LIMIT
    assert len(worst) > 2
    assert max(worst) <= LIMIT


def test_what_is_known_goes_with_the_model():
    model = wrapped(zoo.tiny("llama"))
    exact(model)
    assert model in capabilities._known
    count = len(capabilities._known)
    del model
    import gc

    gc.collect()
    assert len(capabilities._known) < count
