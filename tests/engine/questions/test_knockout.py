"""Knockouts by windows of layers are plain forwards whose tokens do not see others, one a window and group."""

import pytest
import torch
from PIL import Image

import engine
import models
from bench.families import wrapped
from engine.questions.knockout import windows
from tests import plain
from tests.sites import LIMIT, Family

IDS = [[5, 17, 33, 2, 71, 8, 90], [6, 17, 33, 4, 71]]
TARGET = [13, 44]
KEYS = {"first": [[0, 1], 0], "subject": [[2], [1, 3]], "before": [-2, -2]}


@pytest.fixture(scope="module")
def family():
    return Family("llama")


@torch.no_grad()
def plainly(family, n, keys, layers, positions=(-1,), name="llama"):
    heads = torch.zeros(3, 6, dtype=torch.bool)
    heads[layers] = True
    ids = IDS[n]
    out = [key % len(ids) for key in (keys if isinstance(keys, list) else [keys])]
    changes = plain.knocked_out(heads, out, positions)
    return plain.logits(family.same, name, ids, changes).log_softmax(-1)[TARGET[n]].item()


@pytest.mark.parametrize(
    ("window", "layers"), [(1, [[0], [1], [2]]), (2, [[0], [0, 1], [1, 2]]), (3, [[0, 1], [0, 1, 2], [1, 2]])]
)
@pytest.mark.parametrize("memory", [None, 1])
def test_every_group_and_window(family, window, layers, memory):
    given = dict(window=window, targets=TARGET, metric="log_probability", memory=memory, progress=False)
    effects = engine.sweep_knockout(family.model, IDS, KEYS, **given)
    assert effects.patched.shape == (2, 3, 3)
    assert list(effects.positions) == list(KEYS)
    for n in range(2):
        assert abs(effects.clean[n].item() - plainly(family, n, [], [])) <= LIMIT
        for g, keys in enumerate(KEYS.values()):
            for layer in range(3):
                want = plainly(family, n, keys[n], layers[layer])
                assert abs(effects.patched[n, g, layer].item() - want) <= LIMIT
    assert effects.effect.abs().max() > 100 * LIMIT


def test_several_tokens_that_do_not_see(family):
    keys = {"first": [[0], [0]]}
    given = dict(positions=[-1, -2], window=3, targets=TARGET, metric="log_probability", progress=False)
    effects = engine.sweep_knockout(family.model, IDS, keys, **given)
    for n in range(2):
        want = plainly(family, n, [0], [0, 1, 2], (-1, -2))
        assert abs(effects.patched[n, 0, 1].item() - want) <= LIMIT


def test_windows_end_where_layers_do(family):
    for width in (1, 2, 5, 9):
        found = windows(family.model, width)[:, :, 0]
        for layer in range(3):
            inside = [x for x in range(layer - width // 2, layer - width // 2 + width) if 0 <= x < 3]
            assert found[layer].nonzero().flatten().tolist() == inside


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_image_tokens(name):
    """By name, and given token by token; against naive."""
    model = wrapped(name)
    prompt = models.Prompt("Q: <image> up\nA:", (Image.new("RGB", (28, 28), "red"),))
    image = model.read(prompt).image_tokens.nonzero().flatten().tolist()
    given = dict(window=2, targets=[5], metric="log_probability", progress=False)
    effects = engine.sweep_knockout(model, [prompt], {"pixels": "image", "one": [image[:1]]}, **given)
    for g, keys in enumerate((image, image[:1])):
        for layer in range(model.shape.n_layers):
            heads = windows(model, 2)[layer]
            want = engine.naive.patch(model, prompt, engine.Knockout(heads, keys))[0].log_softmax(-1)[5]
            assert abs(effects.patched[0, g, layer].item() - want.item()) <= LIMIT
    assert effects.effect.abs().max() > 10 * LIMIT


def test_alike_by_transformer_lens(family):
    ids, keys = IDS[:1], {"first": [[0, 1]]}
    given = dict(window=2, targets=TARGET[:1], metric="log_probability", progress=False)
    by_lens = engine.sweep_knockout(wrapped("llama", torch.float32, "transformer_lens"), ids, keys, **given)
    plain_one = engine.sweep_knockout(wrapped("llama"), ids, keys, **given)
    torch.testing.assert_close(by_lens.patched, plain_one.patched, atol=LIMIT, rtol=0)
