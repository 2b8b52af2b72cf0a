"""Models and uses that break fast ways: exact, or refused in words. The oracle hooks transformers' own model."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import engine
import models
from bench import architectures
from bench.survey import apart, capture, generated, look
from models import UnsupportedModelError, zoo
from tests.unmet import IDS, LIMIT, SIZES, by_hooks, exact, given, packs, random_, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
