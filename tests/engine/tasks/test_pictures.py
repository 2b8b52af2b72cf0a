"""Questions about pictures: their split, and prompts that never show the query's own picture."""

from pathlib import Path

import pytest
from PIL import Image

from engine import tasks
from engine.tasks import PICTURES, PictureTask, Question
from models import Prompt

from . import layouts

LAYOUTS = {
    "easy_vqa_colour": layouts.easy_vqa,
    "easy_vqa_shape": layouts.easy_vqa,
    "easy_vqa_yes_no": layouts.easy_vqa,
    "fashion_mnist": layouts.fashion_mnist,
    "digits": layouts.digits,
    "flowers": layouts.flowers,
    "cub": layouts.cub,
    "vizwiz": layouts.vizwiz,
    "okvqa": layouts.okvqa,
}


@pytest.fixture
def task():
    """Ten pictures, two questions about each."""
    questions = tuple(
        Question(f"<image> {what} of {i}:", (f"{i}.png",), f" {what}{i}")
        for i in range(10)
        for what in ("colour", "shape")
    )
    return PictureTask("toy", questions, ())


def test_every_picture_task_opens_by_name(tmp_path):
    assert set(LAYOUTS) == set(PICTURES)
    for name, lay in LAYOUTS.items():
        task = tasks.load(name, lay(tmp_path / name))
        assert task.name == name
        assert task.train
        assert task.test
        assert task.open_ended == (not task.labels) == (name in ("vizwiz", "okvqa"))
        asked = [{question.pictures[-1] for question in part} for part in (task.train, task.test)]
        assert asked[0].isdisjoint(asked[1])
        for question in (*task.train, *task.test):
            assert question.answer in (task.labels or (" bus",))


def test_split_is_by_pictures(task):
    """Seven pictures to search on, three to validate: both questions about a picture lie in the same part."""
    split = task.split(seed=3)
    train, validation = ({question.pictures for question in part} for part in split[:2])
    assert (len(train), len(validation)) == (7, 3)
    assert train.isdisjoint(validation)
    assert sorted(q.text for part in split for q in part) == sorted(q.text for q in task.train)
    assert task.split(seed=3) == split
    assert task.split(seed=4) != split


def test_pictures_in_memory_are_called_by_what_they_show():
    """Not by where they lie, which differs from process to process and would change the split."""
    red, same, other = (Image.new("RGB", (4, 4), colour) for colour in ("red", "red", "blue"))
    names = [Question("<image> Colour:", (image,), " red").pictures for image in (red, same, other, red.convert("P"))]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert not any("0x" in name or "Image" in name for (name,) in names)
    assert Question("<image> Colour:", (Path("a/b.png"),), " red").pictures == ("a/b.png",)


def test_prompt():
    """The instruction once, then the demonstrations, then the query; their images in that order."""
    first, second = (Question(f"<image>{n}? Answer:", (f"{n}.png",), f" {n}!") for n in ("one", "two"))
    task = PictureTask("toy", (first,), (second,), separator="; ", instruction="Look. ")
    assert task.example(second, [first]) == (
        Prompt("Look. <image>one? Answer: one!; <image>two? Answer:", ("one.png", "two.png")),
        " two!",
    )
    assert task.example(second).prompt.text == "Look. <image>two? Answer:"


@pytest.mark.parametrize("shots", [0, 1, 9])
def test_no_picture_of_a_query_is_among_its_demonstrations(task, shots):
    examples = task.few_shot(task.train, shots, count=40, seed=1)
    for example in examples:
        *shown, asked = example.prompt.images
        assert len(shown) == shots
        assert asked not in shown
    assert task.few_shot(task.train, shots, count=40, seed=1) == examples
    assert task.few_shot(task.train, shots, count=40, seed=2) != examples
    queries = task.queries(task.train, task.train, shots)
    assert [example.answer for example in queries] == [question.answer for question in task.train]
    assert all(example.prompt.images[-1] not in example.prompt.images[:-1] for example in queries)


def test_overlap_must_be_asked_for(task):
    """Nineteen shots of twenty questions: only with the other question about the query's picture."""
    [example] = task.queries(task.train[:1], task.train[1:], shots=19, overlap=True)
    assert example.prompt.images.count("0.png") == 2


def test_shuffled_answers(task):
    """The questions of the demonstrations, and their answers in another order."""
    clean, shuffled = (task.queries(task.train[:1], task.train, 9, seed=5, shuffled=s)[0] for s in (False, True))
    assert clean.prompt.images == shuffled.prompt.images
    assert clean.answer == shuffled.answer
    texts = [example.prompt.text.split("\n") for example in (clean, shuffled)]
    questions, answers = ([[line.split(":")[part] for line in lines] for lines in texts] for part in (0, 1))
    assert questions[0] == questions[1]
    assert answers[0] != answers[1]
    assert sorted(answers[0]) == sorted(answers[1])
