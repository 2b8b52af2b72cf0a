"""A sweep is a loop of naive forwards, one for every prompt and unit, whatever it saves on the way."""

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import models
from bench.families import wrapped
from engine import Example, groups
from engine.questions.metrics import METRICS, read_metric
from models import zoo
from tests.conftest import KINDS
from tests.sweeps import LIMIT, OTHERS, PROMPTS, TARGETS, agrees, each_head, each_layer, loop, options


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("family", [*KINDS, "gptj"])
def test_every_head_of_every_family(tiny, draw, family):
    model = tiny(family)
    new = draw(model)[1]
    effects = engine.sweep(model, PROMPTS, new, **options())
    assert effects.patched.shape == (3, model.shape.n_layers, model.shape.n_heads)
    assert (effects.groups, effects.positions, effects.reference) == (None, None, None)
    agrees(effects, *loop(model, PROMPTS, each_head(model), [new] * 3))


@pytest.mark.parametrize("metric", [*METRICS, lambda logits: logits[:, 3] * logits[:, 4]])
def test_every_metric(model, values, metric):
    effects = engine.sweep(model, PROMPTS, values, **options(metric=metric))
    assert effects.metric == (metric if isinstance(metric, str) else "custom")
    agrees(effects, *loop(model, PROMPTS, each_head(model), [values] * 3, metric))


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_a_set_of_values_a_prompt(model, draw, mode):
    each = draw(model, rows=3, per_row=True)[1]
    effects = engine.sweep(model, PROMPTS, each, **options(mode=mode))
    agrees(effects, *loop(model, PROMPTS, each_head(model), each, mode=mode))


@pytest.mark.parametrize(
    "made",
    [
        lambda model: groups.layers(model),
        lambda model: groups.pairs(model, [(0, 1), (2, 5), (1, 1)]),
        lambda model: groups.cumulative(model, [(2, 0), (1, 3), (0, 0)]),
    ],
    ids=["layers", "pairs", "cumulative"],
)
def test_groups(model, values, made):
    masks = made(model)
    effects = engine.sweep(model, PROMPTS, values, **options(groups=masks))
    assert list(effects.groups) == list(masks)
    assert all(torch.equal(effects.groups[name], mask) for name, mask in masks.items())
    agrees(effects, *loop(model, PROMPTS, torch.stack(list(masks.values())), [values] * 3))


def test_what_groups_hold(model):
    """Each mask, head by head."""
    shape = model.shape
    heads = {
        name: [tuple(head) for head in mask.nonzero().tolist()]
        for made in (groups.pairs(model, [(0, 1), (2, 5), (1, 1)]), groups.cumulative(model, [(2, 0), (1, 3), (0, 0)]))
        for name, mask in made.items()
    }
    assert heads == {
        "0.1 + 2.5": [(0, 1), (2, 5)],
        "0.1 + 1.1": [(0, 1), (1, 1)],
        "2.5 + 1.1": [(1, 1), (2, 5)],
        "top 1": [(2, 0)],
        "top 2": [(1, 3), (2, 0)],
        "top 3": [(0, 0), (1, 3), (2, 0)],
    }
    for layer, mask in enumerate(groups.layers(model).values()):
        assert mask.nonzero().tolist() == [[layer, head] for head in range(shape.n_heads)]


def test_layers_by_name(model, values):
    named = engine.sweep(model, PROMPTS, values, **options(groups="layers"))
    given = engine.sweep(model, PROMPTS, values, **options(groups=groups.layers(model)))
    assert torch.equal(named.patched, given.patched)
    assert list(named.groups) == list(given.groups)


@pytest.mark.parametrize("family", ["llama", "unpacked"])
def test_each_position_by_itself(tiny, draw, family):
    model = tiny(family)
    new, prompts = draw(model)[1], PROMPTS[:2]
    positions = [-1, 0, -4]
    given = dict(positions=positions, targets=TARGETS[:2], groups="layers", progress=False)
    effects = engine.sweep(model, prompts, new, **given)
    assert effects.positions == positions
    assert effects.patched.shape == (2, 3, model.shape.n_layers)
    for p, position in enumerate(positions):
        one = engine.Effects(effects.patched[:, p], effects.clean, groups=effects.groups)
        agrees(one, *loop(model, prompts, each_layer(model), [new] * 2, position=position))


def test_one_position_as_a_list(model, values):
    """Has the dimension that was asked for."""
    one = engine.sweep(model, PROMPTS, values, **options(positions=-1))
    listed = engine.sweep(model, PROMPTS, values, **options(positions=[-1]))
    assert listed.patched.shape == (3, 1, *one.patched.shape[1:])
    torch.testing.assert_close(listed.patched[:, 0], one.patched, atol=1e-7, rtol=0)


def test_zero(model):
    zeros = torch.zeros(model.shape.n_layers, model.shape.n_heads, model.shape.head_dim)
    effects = engine.sweep(model, PROMPTS, "zero", **options(metric="log_probability"))
    agrees(effects, *loop(model, PROMPTS, each_head(model), [zeros] * 3, "log_probability"))


def test_mean(model):
    z = engine.capture(model, PROMPTS)
    effects = engine.sweep(model, PROMPTS, "mean", **options(metric="log_probability"))
    agrees(effects, *loop(model, PROMPTS, each_head(model), [z.mean(dim=0)] * 3, "log_probability"))


def test_mean_in_float64():
    """Is not rounded to float32 on the way."""
    model = models.wrap(zoo.tiny("llama").double())
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    mean = engine.capture(model, prompts).mean(dim=0)
    effects = engine.sweep(model, prompts, "mean", **options(metric="log_probability"))
    agrees(effects, *loop(model, prompts, each_head(model), [mean] * 3, "log_probability"), limit=1e-12)


def test_resample(model):
    """Each prompt takes the activations of another, none are taken twice, and the seed says whose."""
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [20], [30, 31]]
    z = engine.capture(model, prompts)
    targets, more = [1, 2, 3, 4, 5], dict(metric="log_probability", groups="layers", progress=False)
    every = [engine.sweep(model, prompts, one, targets=targets, **more) for one in z]  # from each prompt into all
    chosen = set()
    for seed in range(3):
        effects = engine.sweep(model, prompts, "resample", targets=targets, seed=seed, **more)
        again = engine.sweep(model, prompts, "resample", targets=targets, seed=seed, **more)
        assert torch.equal(effects.patched, again.patched)
        distances = torch.stack([(one.patched - effects.patched).abs().amax(dim=1) for one in every])
        taken = distances.argmin(dim=0)
        assert (distances.amin(dim=0) < LIMIT).all()
        assert sorted(taken.tolist()) == list(range(5))
        assert (taken != torch.arange(5)).all()
        chosen.add(tuple(taken.tolist()))
    assert len(chosen) > 1


def test_resample_of_two(model):
    """They swap."""
    prompts = [[5, 6, 7], [8, 9, 10]]
    for seed in range(4):
        got = engine.sweep(model, prompts, "resample", seed=seed, targets=[1, 2], progress=False)
        want = engine.sweep(model, prompts, source=prompts[::-1], targets=[1, 2], progress=False)
        torch.testing.assert_close(got.patched, want.patched, atol=LIMIT, rtol=0)
        assert want.effect.abs().max() > 10 * LIMIT


@pytest.mark.parametrize("metric", [*METRICS])
def test_source(model, metric):
    """Noising and denoising are one call, the other way round; the reference is the source's own run."""
    clean, corrupted = [[5, 6, 7, 8], [9, 10, 11], [12, 13]], [[5, 20, 7, 8], [9, 21, 11], [22, 13]]
    score = read_metric(metric, TARGETS, OTHERS, prompts=3, vocab_size=97)
    for prompts, sources in ((clean, corrupted), (corrupted, clean)):
        effects = engine.sweep(model, prompts, source=sources, **options(metric=metric, groups="layers"))
        z = engine.capture(model, sources)
        want = loop(model, prompts, each_layer(model), z, metric)
        torch.testing.assert_close(effects.clean, want[0], atol=LIMIT, rtol=0)
        torch.testing.assert_close(effects.patched, want[1], atol=LIMIT, rtol=0)
        runs = [[engine.naive.patch(model, x, heads=None, values=None) for x in xs] for xs in (prompts, sources)]
        given = zip(runs[1], TARGETS, OTHERS, runs[0], strict=True)
        reference = torch.cat([score(logits, target, other, before[0]) for logits, target, other, before in given])
        torch.testing.assert_close(effects.reference, reference.double(), atol=LIMIT, rtol=0)
        if metric != "rank":
            span = (effects.reference - effects.clean)[:, None]
            torch.testing.assert_close(effects.normalised, effects.effect / span)


def test_source_at_every_position(model):
    prompts, sources = [[5, 6, 7, 8]], [[5, 20, 7, 8]]
    given = dict(positions=range(4), targets=[5], groups="layers", progress=False)
    effects = engine.sweep(model, prompts, source=sources, **given)
    assert effects.patched.shape == (1, 4, model.shape.n_layers)
    assert effects.effect[0, 0].abs().max() < LIMIT  # the first token is the same in both
    z = engine.capture(model, sources, [0, 1, 2, 3])[0]
    for position in range(4):
        want = loop(model, prompts, each_layer(model), [z[position]], position=position, targets=[5])[1]
        torch.testing.assert_close(effects.patched[:, position], want, atol=LIMIT, rtol=0)


def test_source_of_another_length(model):
    """Fits where only the last token is patched."""
    prompts, sources = [[5, 6, 7, 8], [9], [4, 3]], [[5, 20], [9, 21, 11], [22]]
    effects = engine.sweep(model, prompts, source=sources, **options())
    agrees(effects, *loop(model, prompts, each_head(model), engine.capture(model, sources)))


def test_examples_bring_their_targets(model, values):
    """As text, or as ids."""
    words = [" ", "c", "d"]
    ids = [model.tokenizer(word)["input_ids"][0] for word in words]
    wanted = engine.sweep(model, PROMPTS, values, targets=ids, progress=False)
    for targets in (words, ids):
        examples = [Example(*pair) for pair in zip(PROMPTS, targets, strict=True)]
        assert torch.equal(engine.sweep(model, examples, values, progress=False).patched, wanted.patched)


def test_first_tokens_if_asked_for(model, values):
    """Nothing is warned of: it was asked for."""
    effects = engine.sweep(model, PROMPTS, values, targets=[" cold", 5, "xy"], scored="first_token", progress=False)
    first = [model.tokenizer(" ")["input_ids"][0], 5, model.tokenizer("x")["input_ids"][0]]
    assert torch.equal(effects.patched, engine.sweep(model, PROMPTS, values, targets=first, progress=False).patched)


def test_a_metric_that_is_nan(model, values):
    """Is told of after the sweep, with all the prompts it happened on."""
    calls = []

    def broken(logits):
        calls.append(1)
        return logits[:, 3] * (torch.nan if len(calls) in (1, 3) else 1)

    with pytest.raises(ValueError, match=r"custom of the patched run is NaN or infinite for prompts \[0, 2\]"):
        engine.sweep(model, PROMPTS, values, metric=broken, progress=False)


def test_metadata(model, values):
    effects = engine.sweep(model, PROMPTS, values, **options())
    assert {"model": model.name, "prompts": 3, "positions": [-1], "mode": "replace"}.items() <= effects.metadata.items()


def test_prefixes_are_prompts_too(model, values):
    ready = [engine.prefill(model, prompt) for prompt in PROMPTS]
    got, want = (engine.sweep(model, prompts, values, **options()) for prompts in (ready, PROMPTS))
    torch.testing.assert_close(got.patched, want.patched, atol=LIMIT, rtol=0)


def pictures(n):
    noise = np.random.default_rng(0)
    return tuple(Image.fromarray(noise.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in range(n))


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries
@pytest.mark.parametrize("family", ["llava", "paligemma"])
@pytest.mark.parametrize("memory", [None, 1])
def test_images(draw, family, memory):
    """Also at a token before an image, where no prefix is shared, and on a model that never shares one."""
    model = wrapped(family)
    new = draw(model)[1]
    prompt = models.Prompt(f"Q: which?\nA: red\n{models.IMAGE} Q: this one?\nA:", pictures(1))
    images = model.read(prompt).image_tokens
    early = int((~images).nonzero()[0])  # text, or what begins the prompt
    assert early < int(images.nonzero()[0])
    effects = engine.sweep(
        model, [prompt], new, targets=[5], positions=[early, -1], groups="layers", memory=memory, progress=False
    )
    for p, position in enumerate((early, -1)):
        one = engine.Effects(effects.patched[:, p], effects.clean, groups=effects.groups)
        agrees(one, *loop(model, [prompt], each_layer(model), [new], position=position, targets=[5]))
