"""What tests of experiments share: tasks of coloured pictures, and a small run."""

from html.parser import HTMLParser

import torch
from PIL import Image

from engine.experiments import Options, run
from engine.tasks.pictures import PictureTask, Question

SMALL = Options(seeds=1, shots=2, examples=3, steps=2, queries=4)
COLOURS = ("red", "green", "blue")


def picture(seed, colour="red"):
    random = torch.Generator().manual_seed(seed)
    noise = Image.fromarray(torch.randint(256, (28, 28, 3), dtype=torch.uint8, generator=random).numpy())
    return Image.blend(Image.new("RGB", (28, 28), colour), noise, 0.3)


def question(index, name="hue"):
    colour = COLOURS[index % 3]
    return Question(f"<image> {name}:", (picture(index, colour),), colour, (), (f"{name}-{index}",))


def picture_task(name="hue", n_train=12, n_test=5, **options):
    train, test = (
        tuple(question(i, name) for i in part) for part in (range(n_train), range(n_train, n_train + n_test))
    )
    return PictureTask(name, train, test, COLOURS, **options)


def two_way_task():
    """Each question brings a positive and a negative picture, as Flowers and CUB are asked."""
    questions = []
    for index in range(10):
        right, wrong = "AB" if index % 2 else "BA"
        text = f"<image> which? {right}\n<image> which? {wrong}\n<image> which? "
        pictures = tuple(f"{index}-{part}" for part in range(3))
        images = tuple(picture(3 * index + part) for part in range(3))
        questions.append(Question(text, images, right, (), pictures))
    return PictureTask("two_way", tuple(questions[:7]), tuple(questions[7:]), ("A", "B"))


def without_image_answers(hf):
    """A random model may answer with its image token, for which there are no pixels: it shall not."""
    hf.get_output_embeddings().weight.data[97:] = 0
    return hf


def ran(name, model, tasks, folder, options=SMALL, **more):
    return run(name, model, tasks, options, folder=folder, progress=False, **more)


def ways(results):
    return list(dict.fromkeys(record["way"] for record in results.records))


class Page(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
