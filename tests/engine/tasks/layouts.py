"""Small samples of the data sets, in exactly their official layouts."""

import gzip
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

ANSWERS = ["bus"] * 6 + ["red bus"] * 3 + ["unanswerable"]


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(path)


def written(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def easy_vqa(folder: Path) -> Path:
    """Three pictures a part: a red circle, a teal triangle, and one of which only the shape is told."""
    records = [
        ["is there not a red shape?", "no", 0],
        ["what shape is in the image?", "circle", 0],
        ["is there a teal shape in the image?", "no", 0],
        ["is no teal shape present?", "no", 1],
        ["what is the teal shape?", "triangle", 1],
        ["does the image not contain a red shape?", "yes", 2],
        ["is a rectangle present?", "yes", 2],
    ]
    for part in ("train", "test"):
        written(folder / part / "questions.json", records)
        for i in range(3):
            picture(folder / part / "images" / f"{i}.png")
    return folder


def flowers(folder: Path, names: list[str] | None = None) -> Path:
    """Three classes of six pictures; two of each in trnid, one in valid, three in tstid."""
    labels = np.repeat([1, 2, 3], 6).astype(np.uint8)
    for number in range(1, 19):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", number)
    ids = np.arange(1, 19).reshape(3, 6)
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    savemat(
        folder / "setid.mat",
        {"trnid": ids[:, :2].reshape(1, -1), "valid": ids[:, 2:3].T, "tstid": ids[:, 3:].reshape(1, -1)},
    )
    if names:
        (folder / "names.txt").write_text("\n".join(names) + "\n")
    return folder


def cub(folder: Path, pictures: int = 4) -> Path:
    """Two classes; every other picture is in the training part."""
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    images = [f"{name}/{name[4:]}_{i:04d}_{i}.jpg" for name in classes for i in range(pictures)]
    for image in images:
        picture(folder / "images" / image)
    lines = {
        "classes": classes,
        "images": images,
        "image_class_labels": [1 + i // pictures for i in range(len(images))],
        "train_test_split": [i % 2 for i in range(len(images))],
    }
    for name, column in lines.items():
        (folder / f"{name}.txt").write_text("".join(f"{i} {word}\n" for i, word in enumerate(column, start=1)))
    return folder


def fashion_mnist(folder: Path) -> Path:
    """Three pictures of each class a part; the pixels say the part and the class."""
    folder.mkdir(parents=True, exist_ok=True)
    for tint, part in ((0, "train"), (100, "t10k")):
        labels = np.repeat(np.arange(10, dtype=np.uint8), 3)
        pixels = np.tile((labels + tint)[:, None, None], (1, 28, 28))
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def digits(folder: Path, each: int = 5) -> Path:
    """Digits whose pixels are all the digit."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(",".join([str(i % 10)] * 785) + "\n" for i in range(10 * each))
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def vizwiz(folder: Path, count: int = 3) -> Path:
    for part in ("train", "val"):
        names = [f"VizWiz_{part}_{i:08d}.jpg" for i in range(count)]
        records = [
            {
                "image": name,
                "question": f"What is this, {i}?",
                "answers": [{"answer_confidence": "yes", "answer": answer} for answer in ANSWERS],
                "answer_type": "other",
                "answerable": 1,
            }
            for i, name in enumerate(names)
        ]
        written(folder / "Annotations" / f"{part}.json", records)
        for name in names:
            picture(folder / part / name)
    return folder


def okvqa(folder: Path, count: int = 3) -> Path:
    for part in ("train2014", "val2014"):
        questions, annotations = [], []
        for i in range(count):
            ids = {"image_id": 51606 + i, "question_id": 516065 + i}
            answers = [
                {"answer_id": n, "raw_answer": f"{answer}es", "answer_confidence": "yes", "answer": answer}
                for n, answer in enumerate(ANSWERS, start=1)
            ]
            questions.append({**ids, "question": f"What vehicle is this, {i}?"})
            annotations.append({**ids, "answer_type": "other", "question_type": "one", "answers": answers})
            picture(folder / part / f"COCO_{part}_{51606 + i:012d}.jpg")
        written(folder / f"OpenEnded_mscoco_{part}_questions.json", {"info": {}, "questions": questions})
        # Annotations are matched by question_id, not by place.
        written(folder / f"mscoco_{part}_annotations.json", {"info": {}, "annotations": annotations[::-1]})
    return folder
