"""engine.patch gives the logits of one hooked forward a row: over families, strategies, lengths, positions, modes."""

import pytest
import torch

import engine
import models
from models import zoo
from tests.conftest import FAMILIES, PACKED

STRATEGIES = ("auto", "packed", "expanded", "batch", "naive")
# Packed rows of the others are refused, see test_bad_input.py.
PAIRS = [(f, s) for f in FAMILIES for s in STRATEGIES if s != "packed" or f in PACKED]


def exact(got, want, limit=1e-5):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= limit


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 33])
def test_agrees_with_naive(tiny, draw, random, family, strategy, n_tokens):
    model = tiny(family)
    heads, values = draw(model, rows=32)
    prompt = torch.randint(97, (n_tokens,), generator=random)
    want = engine.naive.patch(model, prompt, heads=heads, values=values)
    exact(engine.patch(model, prompt, heads=heads, values=values, strategy=strategy), want)


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_positions_that_coincide_in_one_of_several_prompts(model, draw, random, mode):
    """The last but one and token 11 are one token of 13, and two of 12: tails as long, patched at other tokens."""
    heads, values = draw(model, rows=3)
    prompts = [torch.randint(97, (n,), generator=random) for n in (12, 13)]
    options = dict(heads=heads, values=values, positions=[-2, 11], mode=mode)
    exact(engine.patch(model, prompts, **options), engine.naive.patch(model, prompts, **options))


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
@pytest.mark.parametrize("positions", [0, 3, [-1, 4], [0, -1], list(range(11)), [-2, -2, 9]])
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_positions_and_modes(tiny, draw, random, family, strategy, positions, mode):
    model = tiny(family)
    heads, values = draw(model, rows=3, per_row=True)
    prompt = torch.randint(97, (11,), generator=random)
    options = dict(heads=heads, values=values, positions=positions, mode=mode)
    exact(
        engine.patch(model, prompt, strategy=strategy, **options),
        engine.naive.patch(model, prompt, **options),
    )


@pytest.mark.parametrize("family", PACKED)
def test_agrees_in_float64_to_rounding(draw, random, family):
    """In float64 only the order of summation differs: what remains is not an approximation."""
    model = models.wrap(zoo.tiny(family).double())
    heads, values = draw(model, rows=8)
    prompt = torch.randint(97, (21,), generator=random)
    for strategy in ("packed", "expanded", "batch"):
        got = engine.patch(model, prompt, heads=heads, values=values, strategy=strategy)
        exact(got, engine.naive.patch(model, prompt, heads=heads, values=values), limit=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", PACKED)
def test_half_precision_is_as_near_to_float64_as_naive(draw, random, family, dtype):
    reference, model = models.wrap(zoo.tiny(family).double()), models.wrap(zoo.tiny(family).to(dtype))
    heads, values = draw(model, rows=32)
    prompt = torch.randint(97, (21,), generator=random)
    truth = engine.naive.patch(reference, prompt, heads=heads, values=values)
    naive = engine.naive.patch(model, prompt, heads=heads, values=values).double()
    packed = engine.patch(model, prompt, heads=heads, values=values, strategy="packed").double()
    assert (packed - truth).abs().max() <= 2 * (naive - truth).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_reused_prefix(tiny, draw, random, family):
    model = tiny(family)
    heads, values = draw(model)
    prompt = torch.randint(97, (17,), generator=random)
    prefix = engine.prefill(model, prompt)
    before = [k.clone() for k in prefix.cache.keys]
    for positions in (-1, -1, 5, 0):  # twice the same; then patched earlier, where only part of the prefix serves
        want = engine.naive.patch(model, prompt, heads=heads, values=values, positions=positions)
        exact(engine.patch(model, prefix, heads=heads, values=values, positions=positions), want)
    assert all(torch.equal(a, b) for a, b in zip(before, prefix.cache.keys, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_several_prompts_of_any_length(tiny, draw, random, family):
    model = tiny(family)
    heads, values = draw(model, rows=4)
    prompts = [torch.randint(97, (n,), generator=random) for n in (9, 1, 2, 30, 9)]
    mixed = [prompts[0], engine.prefill(model, prompts[1]), prompts[2], engine.prefill(model, prompts[3]), prompts[4]]
    got = engine.patch(model, mixed, heads=heads, values=values)
    exact(got, engine.naive.patch(model, prompts, heads=heads, values=values))
    assert got.shape == (5, 4, 97)
    one = engine.patch(model, prompts[:1], heads=heads, values=values)
    assert one.shape == (1, 4, 97)


def test_rows_in_many_passes(tiny, draw, random, monkeypatch):
    """More rows than one forward takes: the prefix is still computed once."""
    monkeypatch.setattr("engine.core.planning.MAX_TOKENS", 40)
    model = tiny("llama")
    heads, values = draw(model, rows=30, per_row=True)
    prompt = torch.randint(97, (19,), generator=random)
    for positions in (-1, -7):
        for strategy in ("packed", "expanded", "batch"):
            options = dict(heads=heads, values=values, positions=positions)
            got = engine.patch(model, prompt, strategy=strategy, **options)
            exact(got, engine.naive.patch(model, prompt, **options))


def test_what_heads_can_be(model, draw):
    _, values = draw(model)
    pairs = [(2, 5), (0, 1)]
    mask = torch.zeros(model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    mask[2, 5] = mask[0, 1] = True
    text = "Q: hot\nA:"
    want = engine.naive.patch(model, text, heads=mask[None], values=values)
    assert want.shape == (1, 97)
    for heads in (pairs, mask, mask[None]):
        exact(engine.patch(model, text, heads=heads, values=values), want)
    unpatched = model.forward(model.encode(text)[None])
    exact(engine.patch(model, text, heads=None, values=None), unpatched.detach())
    assert (want - unpatched).abs().max() > 1e-3  # the patch does something


def test_what_a_prompt_can_be(model, draw):
    heads, values = draw(model)
    text = "Q: hot\nA:"
    ids = model.encode(text)
    want = engine.patch(model, text, heads=heads, values=values)
    for prompt in (ids, ids.tolist(), ids.int(), models.Prompt(text)):
        exact(engine.patch(model, prompt, heads=heads, values=values), want, limit=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_with_respect_to_values(model, draw, strategy):
    heads, values = draw(model, rows=2)
    text = "Q: hot\nA:"

    def gradient(patch, **options):
        leaf = values.clone().requires_grad_()
        patch(model, text, heads=heads, values=leaf, **options).logsumexp(dim=-1).sum().backward()
        return leaf.grad

    exact(gradient(engine.patch, strategy=strategy), gradient(engine.naive.patch))
    model.hf.zero_grad()


def test_no_gradient_unless_asked(model, draw):
    heads, values = draw(model)
    assert not engine.patch(model, "abc", heads=heads, values=values).requires_grad


def test_rows_do_not_see_each_other(model, draw, random):
    """A row's logits do not depend on which rows it is packed with."""
    heads, values = draw(model, rows=6)
    prompt = torch.randint(97, (12,), generator=random)
    together = engine.patch(model, prompt, heads=heads, values=values, positions=-3, strategy="packed")
    for row in range(6):
        alone = engine.patch(model, prompt, heads=heads[row], values=values, positions=-3, strategy="packed")
        exact(alone, together[row : row + 1])


def test_auto_never_computes_more_than_naive(model):
    for n_tokens, positions in [(1, -1), (40, -1), (40, 0), (40, 2), (40, 20)]:
        plan = engine.plan(model, [5] * n_tokens, rows=32, positions=positions)
        assert plan.n_computed <= plan.n_naive
        assert plan.strategy in str(plan)


@pytest.mark.parametrize("text", ["Q: big\nA: small\n\n" * 2 + "Q: hot\nA:", "The capital of France is"])
def test_real_model(smollm2, text):
    """On real weights float32 itself is only good to about 1e-4 of a logit (norms amplify rounding): packed rows must
    be as near to float64 as naive ones, and equal to them where rounding plays no part.
    """
    model = smollm2
    means = engine.mean_activations(
        model, ["Q: big\nA: small\n\nQ: old\nA:", "Q: up\nA: down\n\nQ: in\nA:"], progress=False
    )
    heads = torch.rand(32, 30, 9, generator=torch.Generator().manual_seed(0)) < 0.27
    naive = engine.naive.patch(model, text, heads=heads[:8], values=means)
    packed = engine.patch(model, text, heads=heads, values=means, strategy="packed")[:8]
    exact(packed, naive, limit=1e-3)
    assert torch.equal(packed.argmax(-1), naive.argmax(-1))
