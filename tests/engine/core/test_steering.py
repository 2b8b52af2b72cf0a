"""A vector added to the residual stream: after the right layer, at the right token, in the right row, by every way."""

import pytest
import torch

import engine
import models
from bench.families import wrapped
from models import zoo
from tests.conftest import quick
from tests.edits import after

LIMIT = 1e-5
FAMILIES = ("llama", "gpt2", "gptj", "qwen3", "mistral", "gemma2", "gpt_neox", "falcon", "mixtral")


def by_hand(hf, ids, vector, layer):
    """The logits with a hook on one block, plain transformers."""
    blocks = hf.model.layers if hasattr(hf, "model") else hf.transformer.h

    def add(_, __, out):
        h = (out[0] if isinstance(out, tuple) else out).clone()
        h[:, -1] += vector
        return (h, *out[1:]) if isinstance(out, tuple) else h

    handle = blocks[layer].register_forward_hook(add)
    try:
        with torch.no_grad():
            return hf(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_naive_is_a_hook_on_the_block(tiny, random, family):
    model = tiny(family)
    vector = torch.randn(model.shape.d_model, generator=random)
    ids = list(range(3, 15))
    for layer in range(model.shape.n_layers):
        got = engine.naive.patch(model, ids, engine.Patch("resid_post", [layer], vector, mode="add"))[0]
        torch.testing.assert_close(got, by_hand(model.hf, ids, vector, layer), atol=LIMIT, rtol=0)


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "gpt2", "gemma2"))
def test_every_strategy_equals_naive(tiny, draw, random, family):
    model = tiny(family)
    layers = [None, *range(model.shape.n_layers), 0]
    heads, values = draw(model, rows=len(layers))
    heads[:2] = False
    vector = torch.randn(model.shape.d_model, generator=random)
    for tokens in (4, 29):
        ids = torch.randint(97, (tokens,), generator=random)
        for positions in (-1, [-3, -1]):
            options = dict(heads=heads, values=values, positions=positions)
            steered = [after(model, vector, layers, positions)]
            want = engine.naive.patch(model, ids, steered, **options)
            refused = bool(model.rules().packed)
            for strategy in ("auto", "batch", "expanded", *(() if refused else ("packed", "layered"))):
                got = engine.patch(model, ids, steered, strategy=strategy, **options)
                torch.testing.assert_close(got, want, atol=2 * LIMIT, rtol=0)


def test_several_prompts(model, random):
    steered = after(model, torch.randn(model.shape.d_model, generator=random), [0, None, 2])
    prompts = [list(range(n)) for n in (5, 9, 6)]
    got = engine.patch(model, prompts, steered)
    torch.testing.assert_close(got, engine.naive.patch(model, prompts, steered), atol=LIMIT, rtol=0)
    torch.testing.assert_close(got[:, 1], engine.patch(model, prompts)[:, 0], atol=LIMIT, rtol=0)


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_other_backends(random, backend):
    model = wrapped("llama", torch.float32, backend)
    steered = after(model, torch.randn(model.shape.d_model, generator=random), [0, None, 2])
    want = engine.naive.patch(models.wrap(zoo.tiny("llama")), list(range(9)), steered)
    torch.testing.assert_close(engine.naive.patch(model, list(range(9)), steered), want, atol=LIMIT, rtol=0)
    torch.testing.assert_close(engine.patch(model, list(range(9)), steered), want, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "unpacked"])
def test_answers_are_steered_at_every_token(tiny, random, kind):
    """Greedy by hand: the whole sequence again for each token, all new tokens and the last of the prompt steered."""
    model = tiny(kind)
    vector = 5 * torch.randn(model.shape.d_model, generator=random)
    ids = model.encode("Q: hot\nA:").tolist()
    n_prompt = len(ids)
    for _ in range(6):
        positions = list(range(n_prompt - 1, len(ids)))
        logits = engine.naive.patch(model, ids, after(model, vector, 1, positions))[0]
        ids.append(int(logits.argmax()))
    want = model.decode(torch.tensor(ids[n_prompt:]))
    got = engine.generate(model, "Q: hot\nA:", after(model, vector, 1), patched="all", max_new_tokens=6)
    assert got == want
    assert got != engine.generate(model, "Q: hot\nA:", max_new_tokens=6)


def test_gradients_pass(model, draw, random):
    """Of values, through a steered pass."""
    heads, values = draw(model, rows=2)
    found = []
    for strategy in ("packed", "naive"):
        leaf = values.clone().requires_grad_()
        steered = after(model, torch.ones(model.shape.d_model), [1, None])
        logits = engine.patch(model, list(range(9)), steered, heads=heads, values=leaf, strategy=strategy)
        logits.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
