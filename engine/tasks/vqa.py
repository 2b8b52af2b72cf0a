"""Open questions about pictures: VizWiz and OK-VQA in their official layouts, and the VQA accuracy of an answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.tasks.pictures import PictureTask, Question, read_json, required, required_images

# Format of Qwen-VL (https://github.com/QwenLM/Qwen-VL), which the paper uses: demonstrations follow without a break.
TEXT = "<image>{question} Answer:"
# arXiv 2406.15334, appendix C.1
INSTRUCTION = (
    "First carefully understand the given examples. Then use the given image and answer the question in the same way "
    "as the examples. If the question can not be answered, respond unanswerable. "
)
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that the official metric also knows with one of their apostrophes forgotten.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
WRITTEN = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one that the official table turns round


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """The VQA accuracy of an answer: min(1, annotators who gave it / 3), averaged over leaving each annotator out.

    As the official evaluation (https://github.com/GT-Vision-Lab/VQA) computes it: where the annotators differ, all
    answers are normalised (case, punctuation, articles, number words, contractions); where they agree, none is. An
    annotator is left out as a person, so VizWiz, whose answers have no ids, is scored alike. With one answer alone:
    whether it is given.

    Raises ValueError without answers.

    >>> from engine.tasks.vqa import accuracy
    >>> accuracy("The dog.", ["dog"] * 2 + ["cat"] * 8), accuracy("cats", ["dog"] * 2 + ["cat"] * 8)
    (0.6, 0.0)
    """
    if not answers:
        raise ValueError("the VQA accuracy needs the answers of annotators, got none")
    if isinstance(answers, str):
        raise ValueError(f"the VQA accuracy needs a list of the answers of annotators, got {answers!r}")
    given, *right = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *answers))
    if len(set(right)) > 1:
        given, *right = map(normalised, (given, *right))
    if len(right) == 1:
        return float(given == right[0])
    matching = right.count(given)
    return sum(min(1.0, (matching - (other == given)) / 3) for other in right) / len(right)


def normalised(answer: str) -> str:
    """An answer as the official evaluation compares it.

    >>> from engine.tasks.vqa import normalised
    >>> normalised("Two dogs, isnt it?"), normalised("10,000.5 m.")
    ("2 dogs isn't it", '10000.5 m')
    """
    beside_space = {mark for mark in PUNCTUATION if f"{mark} " in answer or f" {mark}" in answer}
    drop_all = re.search(r"\d,\d", answer) is not None
    for mark in PUNCTUATION:
        answer = answer.replace(mark, "" if drop_all or mark in beside_space else " ")
    answer = re.sub(r"\.(?!\d)", "", answer)
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(WRITTEN.get(word, word) for word in words if word not in ARTICLES)


def first_line(text: str) -> str:
    """The answer in a generated text: its first line that is not blank, without space around it.

    >>> from engine.tasks.vqa import first_line
    >>> first_line(" a dog \\n\\nQuestion: what")
    'a dog'
    """
    return text.strip().partition("\n")[0].strip()


def vizwiz(folder: str | Path) -> PictureTask:
    """VizWiz-VQA in its official layout: train and val; "unanswerable" is an answer as others are.

    Every prompt begins with the paper's instruction. The answer of a question is the one most annotators gave.

    folder: with Annotations/train.json and val.json, and the images in train/ and val/.

    Raises FileNotFoundError or ValueError that names the file, or the question that has no answers.

    >>> engine.tasks.load("vizwiz", "VizWiz")
    Traceback (most recent call last):
    FileNotFoundError: VizWiz/Annotations/train.json is missing: expected a list of {"image": ..., "question": ...
    """
    folder = Path(folder)
    expected = 'a list of {"image": ..., "question": ..., "answers": [{"answer": ...}, ...]}'
    parts = []
    for part in ("train", "val"):
        path = folder / "Annotations" / f"{part}.json"
        records = _records(read_json(path, expected), ("image", "question"), path, expected)
        images = [required(folder / part, f"the images of VizWiz's {part} part") / str(r["image"]) for r in records]
        required_images(images, f"VizWiz's {part} part")
        parts.append(
            tuple(
                _question(record["question"], image, record.get("answers"), f"{path}: the question about {image.name}")
                for record, image in zip(records, images, strict=True)
            )
        )
    train, test = parts
    return PictureTask("vizwiz", train, test, open_ended=True, separator="", instruction=INSTRUCTION)


def okvqa(folder: str | Path) -> PictureTask:
    """OK-VQA in its official layout: train2014 and val2014. The answer of a question is the one most annotators gave.

    folder: with OpenEnded_mscoco_train2014_questions.json, mscoco_train2014_annotations.json, the images in
            train2014/COCO_train2014_000000000001.jpg and so on, and the same of val2014.

    Raises FileNotFoundError or ValueError that names the file, or the question that has no answers.

    >>> engine.tasks.load("okvqa", "OK-VQA")
    Traceback (most recent call last):
    FileNotFoundError: OK-VQA/OpenEnded_mscoco_train2014_questions.json is missing: expected {"questions": ...
    """
    folder = Path(folder)
    parts = []
    for part in ("train2014", "val2014"):
        questions = _listed(folder / f"OpenEnded_mscoco_{part}_questions.json", "questions", ("image_id", "question"))
        path = folder / f"mscoco_{part}_annotations.json"
        answers = {record["question_id"]: record.get("answers") for record in _listed(path, "annotations", ())}
        images = [folder / part / f"COCO_{part}_{int(record['image_id']):012d}.jpg" for record in questions]
        required_images(images, f"OK-VQA's {part}")
        parts.append(
            tuple(
                _question(
                    record["question"], image, answers.get(id_ := record["question_id"]), f"{path}: question {id_}"
                )
                for record, image in zip(questions, images, strict=True)
            )
        )
    train, test = parts
    return PictureTask("okvqa", train, test, open_ended=True, separator="")


def _listed(path: Path, key: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The records under a key of one of OK-VQA's files; each has a question_id."""
    keys = ("question_id", *keys)
    expected = f'{{"{key}": [{{{", ".join(f"{one!r}: ..." for one in keys)}}}, ...]}}'.replace("'", '"')
    content = read_json(path, expected)
    return _records(content.get(key) if isinstance(content, dict) else None, keys, path, expected)


def _records(content: Any, keys: Sequence[str], path: Path, expected: str) -> list[dict[str, Any]]:
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected {expected}")
    for record in content:
        if not isinstance(record, dict) or any(not isinstance(record.get(key), str | int) for key in keys):
            raise ValueError(f"{path}: expected {expected}, got {str(record)[:80]}")
    return content


def _question(question: Any, image: Path, answers: Any, where: str) -> Question:
    texts: list[Any] = [answer.get("answer") for answer in answers or () if isinstance(answer, dict)]
    if not texts or not all(isinstance(text, str) for text in texts) or not "".join(texts).strip():
        raise ValueError(f'{where} has no answers: expected "answers": [{{"answer": "..."}}, ...]')
    ((most, _),) = Counter(text.strip() for text in texts if text.strip()).most_common(1)
    return Question(TEXT.format(question=str(question).strip()), (str(image),), f" {most}", tuple(texts))
