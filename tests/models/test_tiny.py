"""Tiny models and processors: all families run, read their inputs as the family does, and are the same every time."""

import string

import numpy as np
import pytest
import torch
from PIL import Image

from models.tiny import CHARACTERS, ENCODERS, IMAGE_TEXT, TEXT, image_marker, tiny, tiny_processor, tiny_tokenizer

# PaliGemma's prompt tokens all see each other, and its processor takes no prompt without an image.
BIDIRECTIONAL = {"paligemma"}
NEEDS_IMAGES = {"paligemma"}
# Cross-attention masks rows that may see no image to see all: also mllama's tokens before an image see it.
SEES_AHEAD = {"paligemma", "mllama"}


@pytest.fixture(scope="module")
def model():
    """Gives the tiny model of a family, made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tiny(family)
        return made[family]

    return make


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def images(n, size=(28, 28), seed=0):
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def prompt(family, n):
    return "ab" + "".join(f"{image_marker(family)}: cat\n" for _ in range(n)) + "what now?"


def processed(family, n, **kwargs):
    return dict(tiny_processor(family)(text=prompt(family, n), images=images(n, **kwargs) or None, return_tensors="pt"))


@pytest.mark.parametrize("family", [*TEXT, *IMAGE_TEXT, *ENCODERS])
def test_same_at_every_call(family):
    torch.manual_seed(1)
    first = tiny(family)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # making one draws nothing from the caller's random numbers
    second = tiny(family)
    names = dict(first.named_parameters())
    assert names.keys() == dict(second.named_parameters()).keys()
    assert all(torch.equal(parameter, names[name]) for name, parameter in second.named_parameters())
    assert not any(module.training for module in first.modules())
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", [*TEXT, *IMAGE_TEXT, *ENCODERS])
def test_special_tokens_lie_in_the_vocabulary(family):
    hf = tiny(family)
    configs = {id(module.config): module.config for module in hf.modules() if hasattr(module, "config")}
    for config in configs.values():
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            assert token is None or 0 <= token < config.get_text_config().vocab_size, (type(config), name)


@pytest.mark.parametrize("family", sorted({*TEXT, *IMAGE_TEXT} - BIDIRECTIONAL))
def test_decoders_are_causal(family, model):
    hf = model(family)
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    want = logits(hf, input_ids=ids)
    assert want.isfinite().all()
    assert 0.5 < want.std() < 5
    assert 2 < want.abs().max() < 15
    assert torch.equal(logits(hf, input_ids=ids), want)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    got = logits(hf, input_ids=changed)
    torch.testing.assert_close(got[:, :9], want[:, :9])
    # Everything later reacts, also beyond one window of 7: three layers see farther than one.
    assert ((got - want)[:, 9:].abs().amax(2) > 1e-4).all()


def test_paligemma_prompts_are_not_causal(model):
    inputs = processed("paligemma", 1)
    want = logits(model("paligemma"), **inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, -2] = 50
    assert ((logits(model("paligemma"), **inputs) - want).abs().amax(2) > 1e-4).all()


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3"])
def test_windows_bite(family):
    narrow, wide = tiny(family), tiny(family)
    assert narrow.config.sliding_window == 7
    for config in {id(m.config): m.config for m in wide.modules() if hasattr(m, "config")}.values():
        config.sliding_window = 100
    for module in wide.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 100
    ids = torch.arange(20)[None]
    got, want = logits(narrow, input_ids=ids), logits(wide, input_ids=ids)
    torch.testing.assert_close(got[:, :7], want[:, :7])
    assert ((got - want)[:, 7:].abs().amax(2) > 1e-3).all()


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_image_text(family, n, model):
    if not n and family in NEEDS_IMAGES:
        pytest.skip("the family needs images")
    hf, inputs = model(family), processed(family, n)
    want = logits(hf, **inputs)
    assert want.shape[:2] == inputs["input_ids"].shape
    assert want.isfinite().all()
    assert 0.5 < want.std() < 5
    assert ("pixel_values" in inputs) == (n > 0)
    if n:
        other = processed(family, n, seed=1)
        assert torch.equal(other["input_ids"], inputs["input_ids"])
        got = logits(hf, **other)
        assert ((got - want)[:, -5:].abs().amax(2) > 1e-4).all()  # the last tokens see the images
        if family not in SEES_AHEAD:
            torch.testing.assert_close(got[:, :2], want[:, :2])  # those before the images do not


@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_images_of_other_shapes(family, model):
    for size in ((40, 24), (20, 64)):
        assert logits(model(family), **processed(family, 1, size=size)).isfinite().all()


@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_each_image_counts(family, model):
    """Only the second of two images differs: tokens up to it stay, later ones react."""
    processor = tiny_processor(family)

    def run(*seen):
        text = prompt(family, len(seen)) if len(seen) > 1 else f"ab{image_marker(family)}: cat\n"
        return logits(model(family), **processor(text=text, images=list(seen), return_tensors="pt"))

    first, second, third = images(3)
    want, got = run(first, second), run(first, third)
    assert ((got - want)[:, -5:].abs().amax(2) > 1e-4).all()
    if family not in SEES_AHEAD:
        alone = run(first)
        n = alone.shape[1]
        torch.testing.assert_close(got[:, :n], want[:, :n], atol=5e-5, rtol=0)  # half of what must differ after it
        torch.testing.assert_close(got[:, :n], alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_processors_round_trip(family):
    processor = tiny_processor(family)
    ids = processed(family, 1)["input_ids"][0]
    # The image token of mllama is beyond the vocabulary but not beyond its embeddings.
    assert ids.max() < tiny(family).get_input_embeddings().num_embeddings
    text = processor.tokenizer.decode(ids)
    assert text.replace("<|begin_of_text|>", "").startswith("ab")
    assert "what now?" in text
    plain = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(plain.split()) == "ab:catwhatnow?"
    again = processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
    assert torch.equal(again, ids)
    image_token = getattr(processor.tokenizer, "image_token_id", None) or processor.image_token_id
    assert image_token == tiny(family).config.image_token_id
    assert image_token in ids


def test_unknown_family():
    with pytest.raises(ValueError, match=r"'lama'.*bert.*gpt2.*llama"):
        tiny("lama")
    for function in (tiny_processor, image_marker):
        with pytest.raises(ValueError, match=r"'llama'.*llava"):
            function("llama")


def test_tiny_tokenizer():
    tokenizer = tiny_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\n"
    assert set(string.printable) - set(text) == set("\t\r\x0b\x0c")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(set(ids)) == len(text) == 96
    assert max(ids) < 97 == len(CHARACTERS) == len(tokenizer)
    assert tokenizer.decode(ids) == text
    assert tokenizer("é")["input_ids"] == [0]
    assert tiny_tokenizer(image_token="<image>")("a<image>b")["input_ids"] == [67, 97, 68]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_text_encoders(family, model):
    ids = torch.arange(3, 20)[None]
    want = logits(model(family), input_ids=ids)
    assert want.shape == (1, 17, 97)
    changed = ids.clone()
    changed[0, 9] = 50
    assert ((logits(model(family), input_ids=changed) - want).abs().amax(2) > 1e-4).all()


def pixels(n, seed=0):
    return torch.randn(n, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_image_encoders(model):
    assert logits(model("vit"), pixel_values=pixels(2)).shape == (2, 5)
    assert (logits(model("vit"), pixel_values=pixels(2)) != logits(model("vit"), pixel_values=pixels(2, 1))).all()
    assert model("clip_vision")(pixel_values=pixels(2)).image_embeds.shape == (2, 32)


@torch.no_grad()
def test_clip(model):
    ids = torch.tensor([[5, 6, 7, 96], [5, 8, 7, 96]])
    out = model("clip")(input_ids=ids, pixel_values=pixels(3))
    assert out.logits_per_image.shape == (3, 2)
    assert len(out.logits_per_image.unique()) == 6
    # The text tower is causal and speaks at the end token, "~".
    states = model("clip_text")(input_ids=ids)
    assert states.text_embeds.shape == (2, 32)
    assert (states.text_embeds[0] != states.text_embeds[1]).all()
    torch.testing.assert_close(states.last_hidden_state[0, 0], states.last_hidden_state[1, 0])
