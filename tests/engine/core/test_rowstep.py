"""A row step of fixed sizes gives what naive gives, whatever it was given before."""

from dataclasses import replace

import pytest
import torch

import engine
import models
from bench.families import requests, wrapped
from models import KeyValues, UnsupportedModelError, zoo
from tests.conftest import quick

LIMIT = 1e-5
PROMPTS = [list(range(3, 3 + n)) for n in (4, 61, 9, 33, 62, 2)]  # longer than every window, then short again


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("positions", [-1, [-3, -1]])
@pytest.mark.parametrize(
    "family", quick(("llama", "gpt2", "qwen3", "mistral", "gemma2", "gemma3"), "llama", "gpt2", "gemma2")
)
def test_equals_naive(tiny, draw, family, positions, mode):
    model = tiny(family)
    step = engine.RowStep(model, rows=5, context=61, positions=positions, mode=mode)
    for index, prompt in enumerate(PROMPTS):
        if len(prompt) <= step.tail:
            continue
        heads, values = draw(model, per_row=index > 3)
        got = step(prompt, heads=heads, values=values)
        want = engine.naive.patch(model, prompt, heads=heads, values=values, positions=positions, mode=mode)
        torch.testing.assert_close(got, want, atol=LIMIT, rtol=0)


def test_a_prefix_is_loaded_once(model, draw):
    step = engine.RowStep(model, rows=5, context=16)
    prefix = engine.prefill(model, "Q: hot\nA:")
    seen = []
    pack, model.pack = model.pack, lambda *args, **kwargs: seen.append(args) or pack(*args, **kwargs)
    try:
        for _ in range(3):
            heads, values = draw(model)
            got = step(prefix, heads=heads, values=values)
    finally:
        del model.pack
    assert len(seen) == 3
    torch.testing.assert_close(got, engine.naive.patch(model, prefix, heads=heads, values=values), atol=LIMIT, rtol=0)


def test_what_is_not_finite_does_not_stay(model, draw):
    heads, values = draw(model)
    step = engine.RowStep(model, rows=5, context=16)
    long = engine.prefill(model, "Q: a longer one")
    poison = KeyValues(long.cache.keys, [torch.full_like(v, torch.nan) for v in long.cache.values])
    assert step(replace(long, cache=poison), heads=heads, values=values).isnan().all()
    got = step("Q: hot", heads=heads, values=values)
    want = engine.naive.patch(model, "Q: hot", heads=heads, values=values)
    torch.testing.assert_close(got, want, atol=LIMIT, rtol=0)


def test_the_prefix_is_not_written_to(model, draw):
    heads, values = draw(model)
    prefix = engine.prefill(model, "Q: hot\nA:")
    before = [t.clone() for t in (*prefix.cache.keys, *prefix.cache.values)]
    step = engine.RowStep(model, rows=5, context=16)
    step(prefix, heads=heads, values=values)
    step("something else", heads=heads, values=values)
    assert all(map(torch.equal, before, (*prefix.cache.keys, *prefix.cache.values)))


def test_image_prompts(draw):
    """Images take up fewer positions than tokens: the offset is a buffer too."""
    model = wrapped("qwen2_vl", torch.float32)
    heads, values = draw(model)
    step = engine.RowStep(model, rows=5, context=256)
    for prompt in [request["prompt"] for request in requests(model)][::4]:
        got = step(prompt, heads=heads, values=values)
        torch.testing.assert_close(
            got, engine.naive.patch(model, prompt, heads=heads, values=values), atol=LIMIT, rtol=0
        )


def test_refuses_what_it_cannot_do(tiny):
    with pytest.raises(UnsupportedModelError, match="the tests say so"):
        engine.RowStep(tiny("unpacked"))
    with pytest.raises(UnsupportedModelError, match="dense mask"):
        engine.RowStep(wrapped("llama", torch.float32, "transformer_lens"), rows=1)([5, 6, 7], heads=None, values=None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_replays_what_the_plain_pass_gives(draw, dtype):
    model = models.wrap(zoo.tiny("llama").to("cuda", dtype))
    graph, eager = (engine.RowStep(model, rows=5, context=64, impl=impl) for impl in ("graph", "eager"))
    for prompt in PROMPTS:
        heads, values = draw(model)
        torch.testing.assert_close(
            graph(prompt, heads=heads, values=values), eager(prompt, heads=heads, values=values), atol=1e-6, rtol=0
        )
