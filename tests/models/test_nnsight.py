"""The nnsight backend gives what the plain one gives on untouched weights, for every family and strategy."""

import subprocess
import sys
from contextvars import ContextVar

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import models
from models import tiny as tiny_models
from models.nnsight_backend import LEFT, NNsightBackend, from_huggingface, is_nnsight
from tests.conftest import quick
from tests.edits import on_z

nnsight = pytest.importorskip("nnsight")

IDS = torch.tensor([5, 40, 2, 77, 31, 8, 8, 60, 13, 22, 9])
STRATEGIES = ("auto", "packed", "expanded", "batch", "naive")
TEXT, IMAGE_TEXT = sorted(tiny_models.TEXT), sorted(tiny_models.IMAGE_TEXT)
FEW = ("llama", "gpt2", "gemma2", "falcon_alibi")  # falcon's rows are not packed


def close(got, want, limit=1e-5):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= limit


@pytest.fixture(scope="module")
def pair():
    """Gives, for a family, the nnsight backend and the plain one on untouched weights; made once."""
    made = {}

    def make(family):
        if family not in made:
            processor = tiny_models.tiny_processor(family) if family in IMAGE_TEXT else None
            tokenizer = None if processor else tiny_models.tiny_tokenizer()
            backend = from_huggingface(tiny_models.tiny(family), tokenizer, processor)
            made[family] = backend, models.wrap(tiny_models.tiny(family), tokenizer, processor=processor)
        return made[family]

    return make


def exact_by(strategy, model):
    refused = {"packed": model.rules().packed, "expanded": model.rules().shared()}
    return not refused.get(strategy)


def picture(size, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def seen(family):
    marker = tiny_models.image_marker(family)
    return models.Prompt(f"ab{marker}: cat\n{marker}: dog", (picture((28, 28), 0), picture((28, 28), 1)))


def state(hf):
    return (
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in hf.modules()],
        [m.training for m in hf.modules()],
        [m.rope_deltas for m in hf.modules() if hasattr(m, "rope_deltas")],
        hf.config._attn_implementation,
        [m.__dict__.get("forward") for m in hf.modules()],
    )


@pytest.mark.parametrize("family", quick(TEXT, "llama", "gpt2", "gemma2", "falcon"))
def test_agrees_with_the_plain_backend(pair, draw, random, family):
    """Strategy "naive" is the backend's own naive forward."""
    model, plain = pair(family)
    heads, values = draw(model, rows=2)
    given = {"replace": values, "add": torch.randn(2, *values.shape, generator=random)}
    for n_tokens in (1, 2, 7, 33):
        prompt = torch.randint(97, (n_tokens,), generator=random)
        prefix = engine.prefill(model, prompt)
        for positions, mode in ((-1, "replace"), ([0], "add"), ([-3, -1], "replace"), ([-3, -1], "add")):
            if positions == [-3, -1] and n_tokens < 3:
                continue
            options = dict(heads=heads, values=given[mode], positions=positions, mode=mode)
            want = engine.naive.patch(plain, prompt, **options)
            for strategy in STRATEGIES:
                if exact_by(strategy, model):
                    close(engine.patch(model, prompt, strategy=strategy, **options), want)
            close(engine.patch(model, prefix, **options), want)  # reused


@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_agrees_with_the_plain_backend_on_images(pair, draw, family):
    model, plain = pair(family)
    heads, values = draw(model, rows=2)
    prompt = seen(family)
    for positions, mode in (([0], "add"), (-1, "add"), ([-3, -1], "replace")):
        options = dict(heads=heads, values=values, positions=positions, mode=mode)
        want = engine.naive.patch(plain, prompt, **options)
        for strategy in STRATEGIES:
            shares = strategy in ("packed", "expanded")
            if exact_by(strategy, model) and not (shares and positions == [0]):  # an image follows
                close(engine.patch(model, prompt, strategy=strategy, **options), want)
    if not model.rules().shared():
        prefix = engine.prefill(model, prompt, positions=-3)
        for _ in range(2):
            close(engine.patch(model, prefix, **options), want)


@pytest.mark.parametrize("family", TEXT)
def test_several_prompts(pair, draw, random, family):
    model, plain = pair(family)
    heads, values = draw(model, rows=2)
    prompts = [torch.randint(97, (n,), generator=random) for n in (9, 1, 20)]
    want = engine.naive.patch(plain, prompts, heads=heads, values=values)
    close(engine.naive.patch(model, prompts, heads=heads, values=values), want)
    mixed = [prompts[0], engine.prefill(model, prompts[1]), *prompts[2:]]
    close(engine.patch(model, mixed, heads=heads, values=values), want)


@pytest.mark.parametrize("family", [*FEW, "llava", "qwen2_vl"])
def test_generation(pair, draw, family):
    model, plain = pair(family)
    heads, values = draw(model, rows=2)
    prompts = ["Q: hot\nA:", "a", seen(family) if family in IMAGE_TEXT else "Q: big\nA: small\n\nQ: up\nA:"]
    options = dict(heads=heads, values=3 * values, max_new_tokens=5)
    want = engine.generate(plain, prompts, strategy="naive", **options)
    for strategy in ("auto", "expanded", "naive"):
        assert engine.generate(model, prompts, strategy=strategy, **options) == want


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("error", [RuntimeError, IndexError, KeyboardInterrupt])
def test_left_as_found_after_an_error(pair, draw, family, error):
    model, plain = pair(family)
    heads, values = draw(model, rows=3)
    want = engine.naive.patch(plain, IDS, heads=heads, values=values)

    def edit(layer, z):
        if layer == 1:
            raise error("stop")
        return z + 1

    calls = [lambda: model.forward(IDS[None], on_z(model, edit))]
    if not model.rules().packed:
        calls.append(lambda: model.pack([models.Segment(IDS[:-1], IDS[None, -1:])], on_z(model, edit)))
    for training in (True, False):
        model.hf.train(training)
        before = state(model.hf)
        for call in calls:
            with pytest.raises(error, match="stop"):
                call()
            assert state(model.hf) == before
            assert not model.model.interleaver.interleaving
            close(engine.patch(model, IDS, heads=heads, values=values), want)


@pytest.mark.parametrize("family", FEW)
def test_gradient_with_respect_to_values(pair, draw, family):
    model, plain = pair(family)
    heads, values = draw(model, rows=2)

    def gradient(of, patch, **options):
        leaf = values.clone().requires_grad_()
        patch(of, IDS, heads=heads, values=leaf, positions=[-3, -1], **options).logsumexp(dim=-1).sum().backward()
        of.hf.zero_grad()
        return leaf.grad

    want = gradient(plain, engine.naive.patch)
    close(gradient(model, engine.naive.patch), want)
    for strategy in STRATEGIES:
        if exact_by(strategy, model):
            close(gradient(model, engine.patch, strategy=strategy), want)
    assert not engine.patch(model, IDS, heads=heads, values=values).requires_grad


def test_activations(pair):
    model, plain = pair("llama")
    prompts = ["Q: hot\nA:", "Q: big\nA:"]
    close(
        engine.mean_activations(model, prompts, progress=False), engine.mean_activations(plain, prompts, progress=False)
    )


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_transformers_model(pair, draw, family):
    """The tokenizer or processor of a TransformersModel is taken over."""
    _, plain = pair(family)
    task = dict(processor=plain.processor, task="image-text-to-text") if plain.processor else {}
    wrapped = nnsight.TransformersModel(tiny_models.tiny(family), tokenizer=plain.tokenizer, **task)
    model = NNsightBackend(wrapped, name="mine")
    assert (model.name, model.tokenizer, model.processor) == ("mine", plain.tokenizer, plain.processor)
    heads, values = draw(model)
    for prompt in ("Q: hot\nA:", *([seen(family)] if plain.processor else [])):
        want = engine.naive.patch(plain, prompt, heads=heads, values=values)
        for strategy in STRATEGIES:
            close(engine.patch(model, prompt, heads=heads, values=values, strategy=strategy), want)


def test_loads_a_model_that_has_no_weights_yet(pair, draw, tmp_path):
    _, plain = pair("llama")
    plain.hf.save_pretrained(tmp_path)
    wrapped = nnsight.TransformersModel(str(tmp_path), task="text-generation", tokenizer=plain.tokenizer)
    assert not wrapped.dispatched
    model = NNsightBackend(wrapped)
    heads, values = draw(model)
    want = engine.naive.patch(plain, IDS, heads=heads, values=values)
    close(engine.patch(model, IDS, heads=heads, values=values), want)


def test_the_callers_traces_still_work(pair, draw):
    """Before and after, on the same nnsight model; within one, patching is refused."""
    _, plain = pair("llama")
    wrapped = nnsight.NNsight(tiny_models.tiny("llama"))
    model = NNsightBackend(wrapped)
    heads, values = draw(model)
    want = plain.hf(input_ids=IDS[None]).logits.detach()
    for _ in range(2):
        with torch.no_grad(), wrapped.trace(input_ids=IDS[None]):
            hidden = wrapped.model.layers[1].output.save()
            logits = wrapped.output.logits.save()
        close(logits, want)
        assert hidden.shape == (1, 11, 48)
        close(
            engine.patch(model, IDS, heads=heads, values=values),
            engine.naive.patch(plain, IDS, heads=heads, values=values),
        )
    with pytest.raises(RuntimeError, match="in a trace already"), wrapped.trace(input_ids=IDS[None]):
        engine.patch(model, IDS, heads=heads, values=values)
    close(
        engine.patch(model, IDS, heads=heads, values=values), engine.naive.patch(plain, IDS, heads=heads, values=values)
    )


def test_edits_registered_with_nnsight(draw):
    """They act on every forward, and no prefix is shared: here one acts on the first token only."""
    wrapped = nnsight.NNsight(tiny_models.tiny("llama"))
    model = NNsightBackend(wrapped)
    heads, values = draw(model)
    unedited = engine.patch(model, IDS, heads=heads, values=values)
    with wrapped.edit() as (_, edited):
        edited.model.layers[0].mlp.output[:, 0] += 1
    backend = NNsightBackend(edited)
    want = engine.naive.patch(backend, IDS, heads=heads, values=values)
    assert (want - unedited).abs().max() > 1e-3
    close(engine.patch(backend, IDS, heads=heads, values=values), want)
    for strategy in ("packed", "expanded"):
        with pytest.raises(models.UnsupportedModelError, match="registered with nnsight"):
            engine.patch(backend, IDS, heads=heads, values=values, strategy=strategy)
    edited.clear_edits()
    with pytest.raises(RuntimeError, match="wrap it again"):
        engine.patch(backend, IDS, heads=heads, values=values)
    close(engine.patch(model, IDS, heads=heads, values=values), unedited, limit=0)  # the copy's edits are the copy's


def test_edit_runs_with_the_callers_context(pair, draw):
    """Context variables and gradient mode are those of the call; other models can be patched from within."""
    model, plain = pair("llama")
    other, _ = pair("gpt2")
    heads, values = draw(other)
    want = engine.patch(other, IDS, heads=heads, values=values)
    variable: ContextVar[int] = ContextVar("variable")
    token = variable.set(3)
    calls = []

    def edit(layer, z):
        calls.append((variable.get(), torch.is_grad_enabled()))
        close(engine.patch(other, IDS, heads=heads, values=values), want, limit=0)
        return z

    with torch.no_grad():
        edits = on_z(model, edit)
        close(model.forward(IDS[None], edits), plain.forward(IDS[None]))
        close(model.pack([models.Segment(IDS[:-1], IDS[None, -1:])], edits).logits[0], plain.forward(IDS[None]))
    variable.reset(token)
    assert calls == [(3, False)] * 6


def test_unwrap():
    """What nnsight put on the modules goes; what was there stays."""
    hf = tiny_models.tiny("llama")
    hf.lm_head.forward = hf.lm_head.forward
    before = [dict(m.__dict__) for m in hf.modules()]
    want = hf(input_ids=IDS[None]).logits
    backend = from_huggingface(hf)
    assert all(key in m.__dict__ for m in hf.modules() for key in LEFT)
    assert backend.unwrap() is hf
    assert [dict(m.__dict__) for m in hf.modules()] == before
    assert torch.equal(hf(input_ids=IDS[None]).logits, want)
    # A wrap that is the caller's own is left alone.
    nnsight.NNsight(hf)
    from_huggingface(hf).unwrap()
    assert all(key in m.__dict__ for m in hf.modules() for key in LEFT)


def test_refused_models_are_left_as_they_were():
    hf = tiny_models.tiny("llama")
    del hf.model.layers[1].self_attn.o_proj
    for other, why in (
        (hf, "no attention output projections"),
        (tiny_models.tiny("bert"), "not a language model"),
        (torch.nn.Linear(2, 2), "not a language model"),
    ):
        with pytest.raises(models.UnsupportedModelError, match=why):
            from_huggingface(other)
        assert not any(key in m.__dict__ for m in other.modules() for key in LEFT)
    with pytest.raises(models.UnsupportedModelError, match="not a language model"):
        NNsightBackend(nnsight.NNsight(torch.nn.Linear(2, 2)))


def test_is_nnsight():
    hf = tiny_models.tiny("gpt2")
    assert not is_nnsight(hf)
    assert is_nnsight(nnsight.NNsight(hf))
    assert is_nnsight(nnsight.TransformersModel(hf, tokenizer=tiny_models.tiny_tokenizer()))
    with pytest.raises(TypeError, match="expected an nnsight model, got GPT2LMHeadModel"):
        NNsightBackend(hf)


def test_nnsight_is_imported_only_when_needed():
    code = "import sys, models.nnsight_backend as b; assert not b.is_nnsight(3) and 'nnsight' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_nnsight(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    assert not is_nnsight(3)
    with pytest.raises(ImportError, match=r"pip install 'headpatch\[nnsight\]'"):
        from_huggingface(tiny_models.tiny("llama"))
