"""The composed image-text model: exact like any other, its tower run once, and it sees."""

import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image, ImageDraw

import engine
import models
from engine import tasks
from models import Prompt
from models.calls import Passing
from models.eyes import Projector, corpus, train


@pytest.fixture(scope="module")
def eyes():
    return models.load("smollm2-eyes")


@pytest.fixture(scope="module")
def questions():
    return tasks.load("easy_vqa_colour").split(0)


@pytest.fixture
def prompt(questions):
    return tasks.load("easy_vqa_colour").example(questions.test[0], questions.train[:2]).prompt


@pytest.mark.parametrize("strategy", ["auto", "packed", "expanded"])
def test_rows_are_those_of_naive(eyes, prompt, strategy):
    """float32 itself is 2e-4 from float64 on these weights."""
    torch.manual_seed(0)
    given = dict(heads=torch.rand(3, 30, 9) < 0.3, values=torch.randn(30, 9, 64) * 0.1)
    got, want = engine.patch(eyes, prompt, **given, strategy=strategy), engine.naive.patch(eyes, prompt, **given)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.01


@pytest.mark.slow
def test_in_float64(prompt):
    model = models.load("smollm2-eyes", dtype=torch.float64)
    torch.manual_seed(0)
    given = dict(heads=torch.rand(2, 30, 9) < 0.3, values=torch.randn(30, 9, 64, dtype=torch.float64) * 0.1)
    got, want = engine.patch(model, prompt, **given), engine.naive.patch(model, prompt, **given)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_the_tower_runs_once_for_all_rows(eyes, prompt):
    runs = []
    handle = eyes.hf.vision.register_forward_hook(Passing(lambda *_: runs.append(1)))
    engine.patch(eyes, prompt, heads=torch.rand(32, 30, 9) < 0.3, values=torch.zeros(30, 9, 64), strategy="packed")
    handle.remove()
    assert len(runs) == 1


def test_several_pictures_stand_where_their_markers_are(eyes):
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    one, other = (eyes.read(Prompt("<image> and <image> then", pictures)) for pictures in ((red, blue), (blue, red)))
    assert one.ids.tolist() == other.ids.tolist()
    assert int(one.image_tokens.sum()) == 2 * eyes.hf.projector.tokens
    torch.testing.assert_close(one.inputs["pixel_values"], other.inputs["pixel_values"].flip(0))


def test_it_sees_held_out_pictures(eyes, questions):
    """The language model names their colours: 1 in 8 by chance."""
    pictures = [corpus.Picture(Image.open(q.images[0]), "", q.answer.strip(), "easy-vqa") for q in questions.test[:60]]
    x = train.features(pictures, eyes.hf.vision)
    found = train.named_rightly(eyes.hf.projector, pictures, x, eyes.hf.language, eyes.tokenizer)
    share, words = found["easy-vqa", "colour"]
    assert words == 8
    assert share > 0.5


@pytest.mark.slow
def test_few_shot_prompts_show_it_the_task(eyes, questions):
    task = tasks.load("easy_vqa_colour")
    few, none = (task.queries(questions.test[:24], questions.train, shots) for shots in (6, 0))
    few, none = (tasks.first_token_hits(eyes, asked).float().mean().item() for asked in (few, none))
    assert few > none + 0.3


def test_refusals(eyes):
    with pytest.raises(ValueError, match="goes to one device"):
        models.load("smollm2-eyes", device_map="auto")
    with pytest.raises(ValueError, match="expected one image for each marker"):
        eyes.read(Prompt("<image> <image>", (Image.new("RGB", (8, 8)),)))


@pytest.fixture(scope="module")
def squares(eyes):
    """Painted squares in three colours, and their features."""
    pictures = []
    for n in range(48):
        colour = ("red", "green", "blue")[n % 3]
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).rectangle((n % 7, n % 5, 20 + n % 9, 22), fill=colour)
        pictures.append(corpus.Picture(image, "square", colour, "painted"))
    return pictures, train.features(pictures, eyes.hf.vision)


def test_ridge_lies_near_the_words(eyes, squares):
    """Its first token is nearest to the embedding of the colour."""
    pictures, x = squares
    embeddings = eyes.hf.get_input_embeddings().weight.detach()
    projector = train.teach(pictures[:36], x[:36], eyes.tokenizer, embeddings)
    assert isinstance(projector, Projector)
    ids = torch.tensor([train.first_token(eyes.tokenizer, word) for word in ("red", "green", "blue")])
    with torch.no_grad():
        nearest = (projector(x[36:])[:, 0] @ torch.nn.functional.normalize(embeddings[ids], dim=-1).T).argmax(dim=-1)
    assert (nearest == torch.tensor([n % 3 for n in range(36, 48)])).float().mean() > 0.8


@pytest.mark.slow
def test_captions_teach_the_projector_alone(eyes, squares):
    pictures, x = squares
    language, before = eyes.hf.language, eyes.hf.language.lm_head.weight.detach().clone()
    projector = train.teach(pictures, x, eyes.tokenizer, eyes.hf.get_input_embeddings().weight.detach())
    torch.manual_seed(0)
    with torch.no_grad():
        projector.up.weight.add_(torch.randn_like(projector.up.weight) * projector.up.weight.std())  # something to mend
    losses = train.caption(projector, pictures, x, language, eyes.tokenizer, steps=12, progress=False)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    torch.testing.assert_close(language.lm_head.weight, before, atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in language.parameters())
    with torch.no_grad():
        norms = projector(x).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, projector.scale.item()))


def test_a_corpus_in_small(tmp_path):
    """Archives of the real layout: what is taught, what is held out, and what is left out."""
    emoji = [
        dict(short_name=name, sort_order=n, unified=code, category=category, subcategory=kind)
        for n, (name, code, category, kind) in enumerate(
            [
                ("red_apple", "1F34E", "Food & Drink", "food-fruit"),
                ("black_heart", "2764-FE0F", "Smileys & Emotion", "heart"),
                ("grinning", "1F600", "Smileys & Emotion", "face-smiling"),
            ]
        )
    ]
    listed = {"package/emoji.json": json.dumps(emoji).encode()}
    apple, heart = (png("red"), png("black"))
    google = {f"package/img/google/64/{code}.png": image for code, image in (("1f34e", apple), ("2764-fe0f", heart))}
    tar(tmp_path / "emoji-datasource-google-16.0.0.tgz", {**listed, **google, "package/img/google/64/1f600.png": apple})
    tar(tmp_path / "emoji-datasource-twitter-16.0.0.tgz", {**listed, "package/img/twitter/64/1f34e.png": apple})
    tar(tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz", {"package/assets/2764.webp": heart})
    clip_art = "usr/share/openclipart/png"
    debian(tmp_path / "openclipart-png_1_all.deb", {
        f"{clip_art}/food/apple_somebody_01.png": apple, f"{clip_art}/food/house_01.png": apple,
        f"{clip_art}/computer/icons/apple.png": apple, f"{clip_art}/led_circle_blue.png": png("blue"),
    })  # fmt: skip
    stamps = "usr/share/tuxpaint/stamps/food"
    debian(tmp_path / "tuxpaint-stamps-default_1_all.deb", {
        f"{stamps}/a.png": apple, f"{stamps}/a.txt": b"A red apple.\nfr.utf8=Une pomme.", f"{stamps}/b.png": apple,
    })  # fmt: skip
    found = corpus.load(tmp_path)
    assert Counter((p.source, p.name) for p in found.train) == {
        ("emoji", "apple"): 3, ("shapes", "heart"): 2 * (1 + corpus.SHOWN), ("clip art", "apple"): 2,
        ("lamps", "circle"): 1 + corpus.SHOWN,
    }  # fmt: skip
    assert [(p.source, p.caption) for p in found.test] == [("emoji", " red apple."), ("stamps", " red apple.")]
    assert {p.image.size for p in (*found.train, *found.test)} == {(64, 64)}


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 12), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def debian(path, files):
    """A package of these files. Debian's own tool makes it, and reads it."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not installed")
    folder = path.with_suffix("")
    for name, content in {"DEBIAN/control": CONTROL, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", folder, path], check=True, capture_output=True)


CONTROL = (
    b"Package: pictures\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: none\n"
)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pictures to teach with"):
        corpus.load(tmp_path)
