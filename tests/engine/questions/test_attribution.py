"""Attribution is the slope of the metric, and with many steps loses nothing of what it adds up to."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import models
from bench.families import wrapped
from engine import attribute
from engine.questions.metrics import read_metric
from models import UnsupportedModelError, zoo
from models.calls import Passing

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15]]
TARGETS, OTHERS = [5, 17, 96], [7, 0, 3]
METRICS = ["probability", "log_probability", "logit_difference", lambda logits: logits[:, 3] * logits[:, 4]]


def options(**more):
    return dict(targets=TARGETS, others=OTHERS, progress=False) | more


def slopes(model, prompt, new, metric="log_probability", position=-1, target=5, other=7, h=1e-4):
    """Slope in a of the metric with z[l, h] + a (new - z)[l, h], at a = 0: central differences of naive forwards."""
    score = read_metric(metric, [target], [other], prompts=1, vocab_size=model.shape.vocab_size)
    change = new - engine.capture(model, [prompt], position)[0]
    heads = torch.eye(change[..., 0].numel(), dtype=torch.bool).unflatten(1, change.shape[:2])
    rows = dict(heads=heads, positions=position, mode="add")
    up, down = (engine.naive.patch(model, prompt, values=a * change, **rows) for a in (h, -h))
    return ((score(up, target, other, up[0]) - score(down, target, other, up[0])) / (2 * h)).view(change.shape[:2])


def exactly(model):
    """Norms compute in float32, whatever they are given: here in the float64 of the rest."""
    for module in model.hf.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen3RMSNorm"):
            norm = dict(normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon)
            module.forward = partial(torch.nn.functional.rms_norm, **norm)
    return model


def double(family="llama"):
    return exactly(models.wrap(zoo.tiny(family).double(), name=family))


def agrees(effect, slope, limit=1e-5):
    torch.testing.assert_close(effect, slope, atol=limit * slope.abs().max().item(), rtol=0)
    assert slope.abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3", "gptj"])
def test_is_the_slope(draw, family):
    model = double(family)
    new = draw(model)[1].double()
    effects = attribute(model, PROMPTS, new, **options(metric="log_probability"))
    assert effects.patched.dtype == torch.float64
    for n, prompt in enumerate(PROMPTS):
        if family == "gptj":  # attends in float32
            agrees(effects.effect[n], slopes(model, prompt, new, target=TARGETS[n], h=0.01), limit=1e-3)
        else:
            agrees(effects.effect[n], slopes(model, prompt, new, target=TARGETS[n]))
        unpatched = engine.naive.patch(model, prompt, heads=None, values=None).log_softmax(dim=-1)
        torch.testing.assert_close(effects.clean[n], unpatched[0, TARGETS[n]])


@pytest.mark.parametrize("metric", METRICS)
def test_of_every_metric(draw, metric):
    model = double()
    new = draw(model)[1].double()
    effects = attribute(model, PROMPTS[:1], new, targets=[5], others=[7], metric=metric, progress=False)
    agrees(effects.effect[0], slopes(model, PROMPTS[0], new, metric))


def test_at_every_position(draw):
    """Each by itself: what is added at one is not added at another."""
    model = double()
    new = draw(model)[1].double()
    effects = attribute(
        model, PROMPTS[:1], new, targets=[5], positions=[-1, 0, -3], metric="log_probability", progress=False
    )
    assert effects.positions == [-1, 0, -3]
    for p, position in enumerate(effects.positions):
        agrees(effects.effect[0, p], slopes(model, PROMPTS[0], new, position=position))


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_other_backends(draw, backend):
    model, new = wrapped("llama", torch.float32, backend), draw(wrapped("llama"))[1]
    effects = attribute(model, PROMPTS, new, **options(steps=2))
    want = attribute(wrapped("llama"), PROMPTS, new, **options(steps=2))
    torch.testing.assert_close(effects.patched, want.patched, atol=1e-5, rtol=0)
    assert want.effect.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries
def test_images(draw):
    model = exactly(wrapped("llava", torch.float64))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
    prompt = models.Prompt(f"{models.IMAGE} Q: which?\nA:", (picture,))
    new = draw(model)[1].double()
    effects = attribute(model, [prompt], new, targets=[5], metric="log_probability", progress=False)
    agrees(effects.effect[0], slopes(model, prompt, new))


@pytest.mark.parametrize("metric", ["log_probability", "kl"])
def test_completeness(draw, metric):
    """Along the path, the effects of all heads sum to that of shifting them all; the midpoint rule errs by 1 / k^2."""
    model = double()
    new = draw(model)[1].double()
    score = read_metric(metric, TARGETS, prompts=3, vocab_size=97)
    whole = []
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        change = new - engine.capture(model, [prompt])[0]
        every = torch.tensor([0, 1]).bool()[:, None, None].expand(2, *change.shape[:2])
        logits = engine.naive.patch(model, prompt, heads=every, values=change, mode="add")
        before, after = score(logits, target, None, logits[0])
        whole.append(after - before)
    errors = []
    for steps in (16, 64):
        effects = attribute(model, PROMPTS, new, **options(metric=metric, steps=steps))
        errors.append((effects.effect.sum(dim=(1, 2)) - torch.stack(whole)).abs())
    assert (errors[1] < 2e-3 * torch.stack(whole).abs()).all()
    assert (errors[1] < errors[0] / 8).all()


def test_points_of_the_path(draw):
    """Two steps: the mean of the gradients a quarter and three quarters on the way, all heads shifted at once."""
    model = double()
    prompt, new = PROMPTS[0], draw(model)[1].double()
    change = new - engine.capture(model, [prompt])[0]
    heads = torch.eye(change[..., 0].numel(), dtype=torch.bool).unflatten(1, change.shape[:2])
    scale, h = torch.tensor([0.25, 0.75]), 1e-4
    slope = []
    for point in scale:
        more = torch.stack([point + h * heads.double(), point - h * heads.double()])[..., None]  # [2, units, L, H, 1]
        every = torch.ones_like(heads)
        up, down = (
            engine.naive.patch(model, prompt, heads=every, values=a * change, mode="add").log_softmax(dim=-1)[:, 5]
            for a in more
        )
        slope.append((up - down).view(change.shape[:2]) / (2 * h))
    effects = attribute(model, [prompt], new, targets=[5], metric="log_probability", steps=2, progress=False)
    agrees(effects.effect[0], sum(slope) / 2)


def test_near_nothing_it_is_the_sweep(draw, random):
    """Where the change is small the estimate is the effect, to second order."""
    model = double()
    z = engine.capture(model, PROMPTS)
    direction = torch.randn(z.shape, generator=random, dtype=torch.float64)
    errors = []
    for size in (1e-3, 1e-4):
        given = (model, PROMPTS, z + size * direction)
        exact, estimated = engine.sweep(*given, **options()), attribute(*given, **options())
        errors.append(((exact.effect - estimated.effect).abs().max() / exact.effect.abs().max()).item())
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("steps", [1, 3])
def test_prompts_together_and_alone(model, draw, steps):
    new = draw(model, rows=3, per_row=True)[1]
    together = attribute(model, PROMPTS, new, **options(steps=steps))
    for n in range(3):
        given = dict(targets=TARGETS[n : n + 1], others=OTHERS[n : n + 1], steps=steps, progress=False)
        alone = attribute(model, PROMPTS[n : n + 1], new[n : n + 1], **given)
        torch.testing.assert_close(alone.patched[0], together.patched[n])


@pytest.mark.parametrize(
    "given",
    [
        dict(values="zero"),
        dict(values="mean"),
        dict(values="resample", seed=3),
        dict(source=[[6, 6, 7, 8, 9, 10, 12], [2, 13, 14], [16]], positions=[-1, 0]),
        dict(source=[[6], [2, 13, 14], [16, 17]], metric="kl", steps=2),
    ],
)
def test_is_what_a_sweep_gives(model, given):
    """The same kind of result, from the same arguments; exact where nothing is estimated."""
    found = attribute(model, PROMPTS, **options(**given))
    steps = given.pop("steps", 1)
    exact = engine.sweep(model, PROMPTS, **options(**given))
    assert found.patched.shape == exact.patched.shape
    assert (found.metric, found.positions, found.groups) == (exact.metric, exact.positions, None)
    torch.testing.assert_close(found.clean, exact.clean, atol=1e-5, rtol=0)
    assert (found.reference is None) == (exact.reference is None)
    if exact.reference is not None:
        torch.testing.assert_close(found.reference, exact.reference, atol=1e-5, rtol=0)
    assert found.rank_correlation(exact) > 0
    said = {"estimate": "attribution patching", "steps": steps}
    assert {**exact.metadata, **said, "mode": None, "groups": None} == {**found.metadata, "mode": None, "groups": None}


def test_weights_are_left_alone(draw):
    model = models.wrap(zoo.tiny("llama"))
    new, parameters = draw(model)[1], list(model.hf.parameters())
    results = []
    for requires in (True, False):
        for parameter in parameters:
            parameter.requires_grad_(requires)
            parameter.grad = torch.full_like(parameter, 3.0) if requires else None
        results.append(attribute(model, PROMPTS, new, **options(steps=2)))
        for parameter in parameters:
            assert parameter.requires_grad == requires
            assert parameter.grad is None or (parameter.grad == 3).all()
    assert torch.equal(results[0].patched, results[1].patched)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_are_recorded(model, draw, context):
    new = draw(model)[1]
    want = attribute(model, PROMPTS, new, **options())
    with context():
        got = attribute(model, PROMPTS, new.clone(), **options())
    assert torch.equal(got.patched, want.patched)


def test_all_steps_in_one_pass(model, draw):
    """Prefix, z, and one forward for all steps; with little memory, several, and the same result."""
    new, lengths = draw(model)[1], []
    handle = model.decoder.register_forward_pre_hook(
        Passing(lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1])), with_kwargs=True
    )
    given = dict(targets=[5], steps=8, progress=False)
    try:
        whole = attribute(model, PROMPTS[:1], new, **given)
        assert lengths == [6, 1, 9]
        lengths.clear()
        parts = attribute(model, PROMPTS[:1], new, memory=1, **given)
        assert lengths == [6, 1, *[1] * 9]
    finally:
        handle.remove()
    torch.testing.assert_close(parts.patched, whole.patched, atol=1e-6, rtol=0)


def test_half_precision(draw):
    """Near to the float32 estimate, and finite."""
    new = draw(models.wrap(zoo.tiny("llama")))[1]
    found = [
        attribute(models.wrap(zoo.tiny("llama").to(dtype)), PROMPTS, new, **options(metric="log_probability"))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert found[0].patched.dtype == torch.float64
    assert found[0].rank_correlation(found[1]) > 0.9


def test_models_without_gradients(draw):
    with torch.inference_mode():
        model = models.wrap(zoo.tiny("llama"), name="frozen")
    new = draw(model)[1]
    with pytest.raises(UnsupportedModelError, match=r"frozen gives no gradients: .*inference mode"):
        attribute(model, PROMPTS, new, **options())

    model = models.wrap(zoo.tiny("llama"), name="quantised")
    for projection in model.projections:
        projection.forward = torch.no_grad()(projection.forward)  # as layers do whose products have no derivative
    with pytest.raises(UnsupportedModelError, match="quantised gives no gradients: its layers record none"):
        attribute(model, PROMPTS, new, **options())


def test_metrics_without_gradients(model, draw):
    new = draw(model)[1]
    with pytest.raises(ValueError, match="the metric records no gradient"):
        attribute(model, PROMPTS, new, metric=lambda logits: logits.detach()[:, 3], progress=False)
    calls = []
    handle = model.hf.register_forward_pre_hook(Passing(lambda *_: calls.append(1)))
    try:
        with pytest.raises(ValueError, match="'rank' has no gradient"):
            attribute(model, PROMPTS, new, **options(metric="rank"))
        with pytest.raises(ValueError, match=r"gradient of 'kl' is 0 .* steps > 1"):
            attribute(model, PROMPTS, new, **options(metric="kl"))
        with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
            attribute(model, PROMPTS, new, **options(steps=0))
    finally:
        handle.remove()
    assert not calls
