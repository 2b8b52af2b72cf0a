"""The composed image-text model: exact like any other, its tower run once, and it sees."""

import pytest
import torch
from PIL import Image, ImageDraw

import engine
import models
from engine import tasks
from models import Prompt
from models.eyes import Projector, corpus, train


@pytest.fixture(scope="module")
def eyes():
    return models.load("smollm2-eyes")


@pytest.fixture(scope="module")
def questions():
    return tasks.load("easy_vqa_colour").split(0)


@pytest.fixture
def prompt(questions):
    return tasks.load("easy_vqa_colour").example(questions.test[0], questions.train[:2]).prompt


@pytest.mark.parametrize("strategy", ["auto", "packed", "expanded"])
def test_rows_are_those_of_naive(eyes, prompt, strategy):
    """float32 itself is 2e-4 from float64 on these weights."""
    torch.manual_seed(0)
    given = dict(heads=torch.rand(3, 30, 9) < 0.3, values=torch.randn(30, 9, 64) * 0.1)
    got, want = engine.patch(eyes, prompt, **given, strategy=strategy), engine.naive.patch(eyes, prompt, **given)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.01


def test_in_float64(prompt):
    model = models.load("smollm2-eyes", dtype=torch.float64)
    torch.manual_seed(0)
    given = dict(heads=torch.rand(2, 30, 9) < 0.3, values=torch.randn(30, 9, 64, dtype=torch.float64) * 0.1)
    got, want = engine.patch(model, prompt, **given), engine.naive.patch(model, prompt, **given)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_the_tower_runs_once_for_all_rows(eyes, prompt):
    runs = []
    handle = eyes.hf.vision.register_forward_hook(lambda *_: runs.append(1))
    engine.patch(eyes, prompt, heads=torch.rand(32, 30, 9) < 0.3, values=torch.zeros(30, 9, 64), strategy="packed")
    handle.remove()
    assert len(runs) == 1


def test_several_pictures_stand_where_their_markers_are(eyes):
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    one, other = (eyes.read(Prompt("<image> and <image> then", pictures)) for pictures in ((red, blue), (blue, red)))
    assert one.ids.tolist() == other.ids.tolist()
    assert int(one.image_tokens.sum()) == 2 * eyes.hf.projector.tokens
    torch.testing.assert_close(one.inputs["pixel_values"], other.inputs["pixel_values"].flip(0))


def test_it_sees_held_out_pictures(eyes, questions):
    """Soft tokens lie nearest to the embedding of their picture's colour: 1 in 8 by chance."""
    embeddings, asked = eyes.hf.get_input_embeddings().weight, questions.test[:60]
    words = tasks.load("easy_vqa_colour").labels
    ids = [train.first_token(eyes.tokenizer, word.strip()) for word in words]
    seen = torch.stack([eyes.read(Prompt("<image>", q.images)).inputs["pixel_values"][0] for q in asked])
    with torch.no_grad():
        soft = eyes.hf.projector(eyes.hf.vision(seen))[:, 0]
    nearest = (soft @ torch.nn.functional.normalize(embeddings[ids], dim=-1).T).argmax(dim=-1).tolist()
    assert sum(words[n] == q.answer for n, q in zip(nearest, asked, strict=True)) > 45


def test_few_shot_prompts_show_it_the_task(eyes, questions):
    task = tasks.load("easy_vqa_colour")
    few, none = (task.queries(questions.test[:24], questions.train, shots) for shots in (6, 0))
    few, none = (tasks.first_token_hits(eyes, asked).float().mean().item() for asked in (few, none))
    assert few > none + 0.3


def test_refusals(eyes):
    with pytest.raises(ValueError, match="goes to one device"):
        models.load("smollm2-eyes", device_map="auto")
    with pytest.raises(ValueError, match="expected one image for each marker"):
        eyes.read(Prompt("<image> <image>", (Image.new("RGB", (8, 8)),)))


def test_teaching(eyes):
    """A projector of a few painted squares tells their colours."""
    pictures = []
    for n in range(48):
        colour = ("red", "green", "blue")[n % 3]
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).rectangle((n % 7, n % 5, 20 + n % 9, 22), fill=colour)
        pictures.append(corpus.Picture(image, "square", colour, "painted"))
    embeddings = eyes.hf.get_input_embeddings().weight.detach()
    x = train.features(pictures, eyes.hf.vision)
    projector = train.teach(pictures[:36], x[:36], eyes.tokenizer, embeddings)
    assert isinstance(projector, Projector)
    share, words = train.named_rightly(projector, pictures[36:], x[36:], eyes.tokenizer, embeddings)[
        "painted", "colour"
    ]
    assert words == 3
    assert share > 0.8


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pictures to teach with"):
        corpus.load(tmp_path)
