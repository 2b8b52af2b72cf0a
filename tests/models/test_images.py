"""Prompts with images: the vision tower runs once for all rows, positions are the model's own, bad input is refused."""

import re

import pytest
import torch
from PIL import Image

import engine
import models
from bench.families import requests, wrapped
from models import Prompt, tiny
from models.calls import Passing
from models.images import fit, image_marker
from tests.edits import on_z

SHARING = [family for family in tiny.IMAGE_TEXT if family not in ("paligemma", "mllama")]


def picture(seed=0):
    random = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (28, 28, 3), dtype=torch.uint8, generator=random).numpy())


@pytest.fixture(scope="module")
def seeing():
    """A function of the family: a tiny image-text model, made once."""
    made = {}

    def make(family="llava"):
        if family not in made:
            made[family] = model = wrapped(family)
            # A random model may answer with its image token, for which there are no pixels: it shall not.
            image_token = getattr(model.hf.config, "image_token_id", None) or model.hf.config.image_token_index
            model.hf.get_output_embeddings().weight.data[image_token:] = 0
        return made[family]

    return make


def count_vision(model):
    """Calls of the vision tower, and the handle that stops the count."""
    tower = next(m for n, m in model.hf.named_modules() if re.search(r"(vision_(tower|model)|visual)$", n))
    calls = []
    return calls, tower.register_forward_pre_hook(Passing(lambda *_: calls.append(1)))


@pytest.mark.parametrize("family", SHARING)
def test_the_vision_tower_runs_once_for_32_rows(seeing, draw, family):
    model = seeing(family)
    heads, values = draw(model, rows=32)
    prompt = Prompt("<image> one, <image> two, <image> which?\nA:", tuple(picture(i) for i in range(3)))
    engine.patch(model, prompt, heads=heads[:1], values=values)  # met for the first time, it is checked
    calls, handle = count_vision(model)
    try:
        engine.prefill(model, "no image")
        once = engine.prefill(model, prompt)
        one_prefill = len(calls)
        calls.clear()
        engine.patch(model, prompt, heads=heads, values=values)
        assert len(calls) == one_prefill  # one for the three pictures, or one a picture
        assert one_prefill in (1, 3)
        calls.clear()
        engine.patch(model, once, heads=heads, values=values)
        assert not calls
    finally:
        handle.remove()


@pytest.mark.parametrize("family", SHARING)
def test_images_and_rows_take_one_pass(seeing, draw, family):
    """Where a token counts by its id and its place alone; Gemma3 has token types, the Qwen family places of its own."""
    model = seeing(family)
    heads, values = draw(model, rows=3)
    prompt = Prompt("<image> one, <image> two, <image> which?\nA:", tuple(picture(i) for i in range(3)))
    engine.patch(model, prompt, heads=heads[:1], values=values)  # met for the first time, it is checked
    passes = []
    handle = model.decoder.register_forward_pre_hook(Passing(lambda *_: passes.append(1)))
    try:
        got = engine.patch(model, prompt, heads=heads, values=values)
    finally:
        handle.remove()
    two = family == "gemma3_vl" or family.startswith("qwen")
    assert len(passes) == (2 if two else 1)
    torch.testing.assert_close(got, engine.naive.patch(model, prompt, heads=heads, values=values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.IMAGE_TEXT)
def test_agrees_with_plain_transformers(seeing, draw, family):
    """The oracle itself, against hooks on the processor's own inputs."""
    model = seeing(family)
    request = next(requests(model))
    prompt, heads, values = request["prompt"], request["heads"][:1], request["values"]
    marker = image_marker(model.processor)
    nested = [list(prompt.images)] if type(model.processor).__name__[:4] in ("Idef", "Smol", "Mlla", "Gemm") else None
    text = prompt.text.replace("<image>", marker)
    inputs = model.processor(text=text, images=nested or list(prompt.images), return_tensors="pt")
    inputs.pop("labels", None)

    def hook(layer):
        def pre(_, args):
            z = args[0].clone().unflatten(-1, values.shape[1:])
            z[0, -1, heads[0, layer]] = values[layer, heads[0, layer]]
            return (z.flatten(-2),)

        return pre

    handles = [p.register_forward_pre_hook(hook(layer)) for layer, p in enumerate(model.projections)]
    try:
        with torch.no_grad():
            want = model.hf(**inputs).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    got = engine.naive.patch(model, prompt, heads=heads, values=values)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3_vl", "paligemma", "mllama"])
def test_other_verbs(seeing, draw, family):
    """capture, means, generation and the search take prompts with images, mixed with text."""
    model = seeing(family)
    heads, values = draw(model, rows=2)
    prompt = Prompt("<image> what is this?\nA:", (picture(),))
    kept = []
    edits = on_z(model, lambda _, z: kept.append(z[0, -1]) or z)
    model.forward(model.read(prompt).ids[None], edits, inputs=model.read(prompt).inputs)
    z = engine.capture(model, [prompt, prompt])
    torch.testing.assert_close(z[0], torch.stack(kept).detach(), atol=1e-5, rtol=0)
    means = engine.mean_activations(model, [prompt, prompt], progress=False)
    torch.testing.assert_close(means, z[0], atol=1e-5, rtol=0)
    options = dict(heads=heads, values=values, max_new_tokens=5)
    assert engine.generate(model, prompt, **options) == engine.generate(model, prompt, strategy="naive", **options)
    examples = [engine.Example(Prompt("<image> which?\nA:", (picture(i),)), "red") for i in range(3)]
    vector = engine.mtv.extract(model, examples, means, steps=2, rollouts=4, progress=False)
    assert vector.mask.shape == heads.shape[1:]


def test_a_text_prompt_after_an_image_prompt(seeing, draw):
    """What the Qwen family remembers of the positions of an image must not leak into the next prompt."""
    model = seeing("qwen2_vl")
    heads, values = draw(model)
    text = "Q: which one?\nA:"
    before = engine.patch(model, text, heads=heads, values=values, strategy="expanded")
    engine.patch(model, Prompt("<image> which?\nA:", (picture(),)), heads=heads, values=values)
    after = engine.patch(model, text, heads=heads, values=values, strategy="expanded")
    torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_a_patch_before_an_image_shares_nothing(seeing, draw):
    model = seeing("llava")
    heads, values = draw(model)
    prompt = Prompt("Q: <image> which?\nA:", (picture(),))
    for position in (0, 1):
        options = dict(heads=heads, values=values, positions=position)
        want = engine.naive.patch(model, prompt, **options)
        torch.testing.assert_close(engine.patch(model, prompt, **options), want, atol=1e-5, rtol=0)
        assert engine.plan(model, prompt, rows=5, positions=position).strategy == "batch"
        with pytest.raises(models.UnsupportedModelError, match="an image follows"):
            engine.patch(model, prompt, strategy="packed", **options)


def test_bad_images(seeing, model, tmp_path):
    llava = seeing("llava")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    ok = picture()
    cases = [
        (llava, Prompt("<image> a", (ok, ok)), r"1 image marker\(s\).* and 2 image\(s\)"),
        (llava, Prompt("<image><image> a", (ok,)), r"2 image marker\(s\).* and 1 image\(s\)"),
        (llava, Prompt("a", (ok,)), r"0 image marker\(s\)"),
        (llava, Prompt("<image> a"), "image markers and no images"),
        (llava, Prompt("<image> a", (broken,)), "image 0 cannot be read.*broken.png"),
        (llava, Prompt("<image> a", (tmp_path / "none.png",)), "image 0 cannot be read"),
        (model, Prompt("<image> a", (ok,)), "is a text model"),
    ]
    for bad_model, prompt, said in cases:
        with pytest.raises(ValueError, match=said):
            engine.patch(bad_model, prompt, heads=None, values=None)
    with pytest.raises(ValueError, match="position 2 of the prompt is an image token"):
        engine.patch(llava, Prompt("a <image> b", (ok,)), heads=None, values=None, positions=2)


def test_paths_are_opened(seeing, tmp_path):
    model, path = seeing("llava"), tmp_path / "a.png"
    picture().save(path)
    by_path, by_image = (model.read(Prompt("<image> a", (image,))) for image in (path, picture()))
    torch.testing.assert_close(by_path.inputs["pixel_values"], by_image.inputs["pixel_values"])


def test_inputs_follow_the_tokens():
    types = torch.arange(5)[None]
    assert fit({"token_type_ids": types}, 3)["token_type_ids"].tolist() == [[0, 1, 2]]
    assert fit({"token_type_ids": types}, 7)["token_type_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 4]]
    assert fit({"pixel_values": types}, 3)["pixel_values"] is types
