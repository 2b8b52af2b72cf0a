"""Hooks that others left on, threads, calls within calls: exact, or refused in words."""

import threading
import time
from collections import Counter

import pytest
import torch

import engine
import models
from bench.survey import apart, capture, generated
from engine.core import capabilities
from models import UnsupportedModelError, zoo
from tests.unmet import IDS, LIMIT, by_hooks, exact, given, packs, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
