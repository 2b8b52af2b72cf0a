"""easy-VQA: every question is understood, negations too, and the labels are those that the pixels show."""

import importlib.util
from collections import Counter

import pytest
from PIL import Image, ImageColor

from engine import tasks
from engine.tasks.easy_vqa import COLOURS, SHAPES, told

from . import layouts

installed = pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")


@pytest.mark.parametrize("thing", ["red shape", "circle"])
@pytest.mark.parametrize(
    ("question", "negated"),
    [
        ("does the image contain a {}?", False),
        ("does the image not contain a {}?", True),
        ("is a {} present?", False),
        ("is no {} present?", True),
        ("is there a {}?", False),
        ("is there a {} in the image?", False),
        ("is there not a {}?", True),
        ("is there not a {} in the image?", True),
    ],
)
def test_yes_and_no(question, negated, thing):
    there = {"colour": "red"} if thing == "red shape" else {"shape": "circle"}
    assert told(question.format(thing), "no" if negated else "yes") == there
    assert told(question.format(thing), "yes" if negated else "no") == {}


@pytest.mark.parametrize(
    ("question", "answer", "facts"),
    [
        ("what color is the shape?", "teal", {"colour": "teal"}),
        ("what color is the circle?", "teal", {"colour": "teal", "shape": "circle"}),
        ("what is the color of the shape?", "gray", {"colour": "gray"}),
        ("what is the color of the rectangle?", "gray", {"colour": "gray", "shape": "rectangle"}),
        ("what is the blue shape?", "triangle", {"colour": "blue", "shape": "triangle"}),
        ("what shape does the image contain?", "circle", {"shape": "circle"}),
        ("what shape is in the image?", "circle", {"shape": "circle"}),
        ("what shape is present?", "circle", {"shape": "circle"}),
    ],
)
def test_which(question, answer, facts):
    assert told(question, answer) == facts


def test_labels_and_prompts(tmp_path):
    folder = layouts.easy_vqa(tmp_path)
    colour, shape, yes_no = (tasks.load(f"easy_vqa_{kind}", folder) for kind in ("colour", "shape", "yes_no"))
    assert [question.answer for question in colour.train] == [" red", " teal"]  # nothing says what the third is
    assert [question.answer for question in shape.train] == [" circle", " triangle", " rectangle"]
    assert colour.example(colour.test[1], colour.train[:1]).prompt.text == (
        "Q: <image> Colour?\nA: red\n\nQ: <image> Colour?\nA:"
    )
    assert shape.example(shape.test[1]).prompt.images == (str(tmp_path / "test" / "images" / "1.png"),)
    assert yes_no.train[0].text == "Q: <image> is there not a red shape?\nA:"
    assert [question.answer for question in yes_no.train] == [" no", " no", " no", " yes", " yes"]


@installed
def test_the_labels_are_what_the_pixels_show():
    """Every picture holds one shape, in a flat colour on a pale ground: that of its label."""
    task = tasks.load("easy_vqa_colour")
    assert task.labels == tuple(f" {colour}" for colour in COLOURS)
    flat = {colour: ImageColor.getrgb(colour) for colour in COLOURS} | {"green": ImageColor.getrgb("lime")}
    for question in (*task.train[::10], *task.test[::10]):
        image = Image.open(question.images[0]).convert("RGB")
        counts = {colour: n for n, colour in image.getcolors(64 * 64)}
        assert max(flat, key=lambda colour: counts.get(flat[colour], 0)) == question.answer.strip()


@installed
@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_the_package(kind):
    """Nine in ten of the 4,000 and 1,000 pictures are told about, each once, and no label is rare."""
    task = tasks.load(f"easy_vqa_{kind}")
    labels = SHAPES if kind == "shape" else COLOURS
    for part, pictures in ((task.train, 4000), (task.test, 1000)):
        assert 0.9 * pictures < len(part) == len({question.pictures for question in part})
        counts = Counter(question.answer.strip() for question in part)
        assert set(counts) == set(labels)
        assert min(counts.values()) > 0.8 * len(part) / len(labels)
