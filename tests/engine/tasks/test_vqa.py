"""The VQA accuracy, by hand; VizWiz and OK-VQA read from their official layouts, asked in the paper's words."""

from itertools import combinations

import pytest

from engine import tasks
from engine.tasks.vqa import accuracy, first_line, normalised

from . import layouts

OTHER = [f"other{i}" for i in range(10)]


@pytest.mark.parametrize("matching", range(1, 10))
def test_accuracy_is_the_mean_over_the_subsets_of_nine(matching):
    answers = ["yes"] * matching + OTHER[matching:]
    by_definition = [min(1, nine.count("yes") / 3) for nine in combinations(answers, 9)]
    assert accuracy("yes", answers) == pytest.approx(sum(by_definition) / 10)


def test_accuracy_of_few_and_none():
    assert accuracy("maybe", OTHER) == 0
    assert accuracy("other3", OTHER) == pytest.approx(0.9 / 3)
    assert accuracy(" yes", ["yes"] * 10) == 1
    assert (accuracy(" red\n", [" red"]), accuracy("blue", ["red"])) == (1, 0)


def test_all_sides_are_normalised_where_annotators_differ():
    answers = ["The Dog", "dog.", "a dog", *OTHER[:7]]
    assert accuracy("DOG!", answers) == accuracy("dog", answers) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert accuracy("2", ["two"] * 9 + ["none"]) == 1


def test_nothing_is_normalised_where_annotators_agree():
    """The official evaluation is so: the text itself, but for space around it."""
    assert accuracy("Yes", ["yes"] * 10) == 0
    assert accuracy("\tthe dog\n", ["the dog"] * 10) == 1


def test_unanswerable_counts_as_other_answers_do():
    assert accuracy("Unanswerable.", ["unanswerable"] * 4 + OTHER[:6]) == 1


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("Red", "red"),
        ("a red the bus", "red bus"),
        ("none", "0"),
        ("Ten zebras", "10 zebras"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # both apostrophes forgotten: not in the table
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("it's", "it's"),
        ("blue/green", "blue green"),
        ("red, white", "red white"),
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),  # beside a space somewhere: taken out everywhere
        ("1,000 t-shirts", "1000 tshirts"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("yes.", "yes"),
        ("what?!", "what"),
        ("  two   words ", "2 words"),
        ("the", ""),
    ],
)
def test_normalised(answer, compared):
    assert normalised(answer) == compared


def test_first_line():
    assert first_line(" red bus\nQuestion: what") == "red bus"
    assert first_line("\n red\r\nblue") == "red"
    assert first_line(" ") == ""


def test_vizwiz(tmp_path):
    task = tasks.load("vizwiz", layouts.vizwiz(tmp_path))
    first = task.train[0]
    assert first.images == (str(tmp_path / "train" / "VizWiz_train_00000000.jpg"),)
    assert (first.answer, first.answers) == (" bus", tuple(layouts.ANSWERS))
    assert task.test[2].images == (str(tmp_path / "val" / "VizWiz_val_00000002.jpg"),)
    assert task.example(task.test[2], [first]).prompt.text == (
        "First carefully understand the given examples. Then use the given image and answer the question in the same "
        "way as the examples. If the question can not be answered, respond unanswerable. "
        "<image>What is this, 0? Answer: bus<image>What is this, 2? Answer:"
    )


def test_okvqa(tmp_path):
    """Answers as the official metric compares them ("answer", not "raw_answer"), found by the question's id."""
    task = tasks.load("okvqa", layouts.okvqa(tmp_path))
    first, second = task.train[:2]
    assert first.images == (str(tmp_path / "train2014" / "COCO_train2014_000000051606.jpg"),)
    assert (first.answer, first.answers) == (" bus", tuple(layouts.ANSWERS))
    assert task.example(second, [first]).prompt.text == (
        "<image>What vehicle is this, 0? Answer: bus<image>What vehicle is this, 1? Answer:"
    )
    assert [accuracy(text, first.answers) for text in ("bus", "red bus")] == pytest.approx([1, (3 * 2 / 3 + 7) / 10])
