"""Encoders are patched by batched rows; what would share tokens is refused."""

from typing import get_args

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

import engine
import models
from models import Prompt, tiny

FAMILIES = [family for family in tiny.ENCODERS if family != "clip"]
SIZE = dict(size=dict(height=28, width=28))


@pytest.fixture(params=FAMILIES)
def asked(request):
    """An encoder, a prompt for it, and the plain forward's inputs."""
    family, hf = request.param, tiny.tiny(request.param)
    noise = torch.randint(256, (28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    if hf.main_input_name == "pixel_values":
        kind = ViTImageProcessorPil if family == "vit" else CLIPImageProcessorPil
        processor = kind(**SIZE, crop_size=dict(height=28, width=28))
        inputs = processor(images=image, return_tensors="pt")
        return models.wrap(hf, processor=processor, name=family), Prompt("", (image,)), dict(inputs)
    ids = torch.tensor([34, 5, 17, 60, 8, 96])  # the tower of CLIP reads its answer at "~", 96
    return models.wrap(hf, tiny.tiny_tokenizer(), name=family), ids, {"input_ids": ids[None]}


def answer(hf, inputs):
    with torch.no_grad():
        out = hf(**inputs)
    found = next(out[key] for key in ("logits", "image_embeds", "text_embeds") if key in out)
    return found[:, -1] if found.ndim == 3 else found


def test_agrees_with_plain_transformers(asked, draw):
    model, prompt, inputs = asked
    heads, values = draw(model, rows=5)
    for position in (0, -2):
        got = engine.patch(model, prompt, heads=heads, values=values, positions=position)
        for row in range(5):
            handles = [
                p.register_forward_pre_hook(_replace(heads[row, layer], values[layer], position))
                for layer, p in enumerate(model.projections)
            ]
            want = answer(model.hf, inputs)
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(got[row : row + 1], want, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            got,
            engine.naive.patch(model, prompt, heads=heads, values=values, positions=position),
            atol=1e-5,
            rtol=0,
        )


def _replace(on, values, position):
    def pre(_, args):
        z = args[0].clone().unflatten(-1, values.shape)
        z[0, position, on] = values[on]
        return (z.flatten(-2),)

    return pre


def test_capture_and_refusals(asked, draw):
    model, prompt, _ = asked
    heads, values = draw(model)
    assert engine.capture(model, [prompt, prompt], positions=[0, 1]).shape == (2, 2, *values.shape)
    assert engine.plan(model, prompt, rows=3).strategy == "batch"
    for strategy in ("packed", "expanded"):
        with pytest.raises(models.UnsupportedModelError, match="it is an encoder"):
            engine.patch(model, prompt, heads=heads, values=values, strategy=strategy)
    with pytest.raises(models.UnsupportedModelError, match="does not generate"):
        engine.generate(model, prompt)


def test_the_answer_is_read_at_the_mask():
    model = models.wrap(tiny.tiny("bert"), tiny.tiny_tokenizer(mask_token="[M]"))
    model.tokenizer.mask_token_id = 20
    ids = torch.tensor([5, 20, 7, 9])
    with torch.no_grad():
        want = model.hf(ids[None]).logits[:, 1]
    torch.testing.assert_close(engine.patch(model, ids, heads=None, values=None), want, atol=1e-5, rtol=0)


def test_both_towers_at_once_are_refused():
    with pytest.raises((models.UnsupportedModelError, AttributeError)):
        models.wrap(tiny.tiny("clip"))


@pytest.mark.parametrize("site", get_args(models.Site))
def test_every_site(asked, site):
    """By the only way that there is, against a forward a row; and something of it reaches the answer."""
    model, prompt, _ = asked
    size = model.site(site)
    units = torch.zeros(2, size.n_layers, size.units, dtype=torch.bool)
    units[0, 0, 0] = units[1, -1] = True
    patch = engine.Patch(site, units, 0.5, [0, -1], "scale")
    got = engine.patch(model, prompt, patch)
    torch.testing.assert_close(got, engine.naive.patch(model, prompt, patch), atol=1e-5, rtol=0)
    clean = engine.patch(model, prompt)
    assert ((got - clean).abs().amax(dim=1) > 1e-6).any()


def test_resid_post_by_a_hook(asked):
    """Added to what a block gives, by plain hooks."""
    model, prompt, inputs = asked
    vector = torch.linspace(-2, 2, model.shape.d_model)
    got = engine.patch(model, prompt, engine.Patch("resid_post", [0], vector, 0, "add"))

    def add(_, __, out):
        h = (out[0] if isinstance(out, tuple) else out).clone()
        h[:, 0] += vector
        return (h, *out[1:]) if isinstance(out, tuple) else h

    handle = model.body.blocks[0].register_forward_hook(add)
    try:
        want = answer(model.hf, inputs)
    finally:
        handle.remove()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
