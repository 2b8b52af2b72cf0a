"""2-way questions: the paper's format to the letter, and examples of the query's class and of another."""

from pathlib import Path

import numpy as np
import pytest

from engine import tasks
from engine.tasks.two_way import two_way

from . import layouts

# arXiv 2406.15334, appendix C.3 and C.4: the code listings, with <image> for the picture.
PAPER = (
    "<image>What is the type of {noun} in the image? A.{a} B.{b}\nAnswer with the option's letter from the given "
    "choice directly. Answer: A\n"
    "<image>What is the type of {noun} in the image? A.{a} B.{b}\nAnswer with the option's letter from the given "
    "choice directly. Answer: B\n"
    "<image>What is the type of {noun} in the image? A.{a} B.{b}\nAnswer with the option's letter from the given "
    "choice directly. Answer:"
)


@pytest.fixture
def classes():
    return {kind: [f"{kind}{i}.jpg" for i in range(12)] for kind in ("cat", "dog", "cow")}


def test_questions(classes):
    """A is shown first; the query is a third picture, of the class whose letter is the answer."""
    task = two_way("pets", classes, "pet", seed=1)
    for question in (*task.train, *task.test):
        of_a, of_b, asked = question.images
        a, b, right = (image[:3] for image in question.images)
        assert question.text == PAPER.format(noun="pet", a=a, b=b)
        assert a != b
        assert asked not in (of_a, of_b)
        assert question.answer == (" A" if right == a else " B")
        assert right in (a, b)
        assert question.pictures == question.images
    assert {question.answer for question in task.train} == {" A", " B"}
    assert two_way("pets", classes, "pet", seed=1) == task
    assert two_way("pets", classes, "pet", seed=2) != task


def test_parts_share_no_picture(classes):
    """A fifth of each class is the test part; every picture is asked about once, or `count` are."""
    task = two_way("pets", classes, "pet")
    train, test = ({name for q in part for name in q.pictures} for part in (task.train, task.test))
    assert train.isdisjoint(test)
    assert len({question.pictures[-1] for question in task.train}) == len(task.train) == 30
    assert len({question.pictures[-1] for question in task.test}) == len(task.test) == 6
    assert [len(part) for part in (two_way("pets", classes, "pet", count=4)).split()] == [3, 1, 4]


def test_several_shots(classes):
    """Questions one after the other; no picture of the query, shown or asked about, is in a demonstration."""
    task = two_way("pets", classes, "pet")
    for example in task.queries(task.test, task.train, shots=2):
        assert len(example.prompt.images) == 9
        assert set(example.prompt.images[:6]).isdisjoint(example.prompt.images[6:])
        assert example.prompt.text.count("Answer: A\n") >= 2


def test_pictures_without_a_path():
    """They are called by their class and place, so that a query's are known among the demonstrations."""
    black, white = (np.full((5, 2, 2), shade, np.uint8) for shade in (0, 255))
    task = two_way("shades", {"black": black, "white": white}, "shade")
    for question in (*task.train, *task.test):
        shades = [image.getpixel((0, 0)) for image in question.images]
        assert [0 if "black" in name else 255 for name in question.pictures] == shades
    assert task.train[0].pictures[0].startswith("shades ")


def test_flowers(tmp_path):
    """Official trnid to train, tstid to test, valid left out; image 1 is picture 1 of the labels."""
    task = tasks.load("flowers", layouts.flowers(tmp_path))
    asked = [{int(Path(q.images[-1]).stem[-5:]) for q in part} for part in (task.train, task.test)]
    assert asked == [{1, 2, 7, 8, 13, 14}, {4, 5, 6, 10, 11, 12, 16, 17, 18}]
    for question in (*task.train, *task.test):
        a, b = ((int(Path(image).stem[-5:]) - 1) // 6 + 1 for image in question.images[:2])
        assert question.text == PAPER.format(noun="flower", a=f"flower {a}", b=f"flower {b}")


def test_names_of_flowers(tmp_path):
    task = tasks.load("flowers", layouts.flowers(tmp_path, ["pink primrose", "bearded iris", "snapdragon"]))
    named = {1: "pink primrose", 2: "bearded iris", 3: "snapdragon"}
    a, b = (named[(int(Path(image).stem[-5:]) - 1) // 6 + 1] for image in task.train[0].images[:2])
    assert f"A.{a} B.{b}\n" in task.train[0].text


def test_cub(tmp_path):
    task = tasks.load("cub", layouts.cub(tmp_path))
    assert {Path(q.images[-1]).stem[-1] for q in task.train} == {"1", "3"}
    assert {Path(q.images[-1]).stem[-1] for q in task.test} == {"0", "2"}
    for question in task.train:
        a, b = (Path(image).parent.name[4:].replace("_", " ") for image in question.images[:2])
        assert question.text == PAPER.format(noun="bird", a=a, b=b)
        assert {a, b} == {"Black footed Albatross", "Laysan Albatross"}


def test_fashion_mnist(tmp_path):
    task = tasks.load("fashion_mnist", layouts.fashion_mnist(tmp_path))
    assert len(task.train) == len(task.test) == 30
    for tint, part in ((0, task.train), (100, task.test)):
        for question in part:
            assert question.images[0].size == (28, 28)
            a, b = (tasks.two_way.CLOTHES[image.getpixel((3, 3)) - tint] for image in question.images[:2])
            assert question.text == PAPER.format(noun="clothing", a=a, b=b)


def test_digits(tmp_path):
    task = tasks.load("digits", layouts.digits(tmp_path))
    assert (len(task.train), len(task.test)) == (30, 20)
    for question in task.train:
        a, b, asked = (image.getpixel((0, 0)) for image in question.images)
        assert question.text == PAPER.format(noun="digit", a=a, b=b)
        assert question.answer == (" A" if asked == a else " B")
