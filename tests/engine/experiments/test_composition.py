"""`headpatch weights` in small: two packaged sets, a few steps; its heads, parts, files; data from archives."""

import gzip
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from engine.cli import app
from engine.experiments import composition
from engine.experiments.composition import fetching, sets, stages, ways
from engine.experiments.composition.sets import Labelled

SMALL = composition.Options(seeds=1, samples=200, base_steps=4, tune_steps=3, epochs=1, forget_epochs=1)


@pytest.fixture(scope="module")
def pictures():
    return sets.images(("mnist", "digits"))


def test_parts_are_disjoint_and_of_the_seed(pictures):
    numbered = Labelled("n", {"x": torch.arange(1000)}, torch.zeros(1000), ("a",))
    split = numbered.split(0, 400)
    assert {part: len(rows) for part, rows in split.items()}.keys() == sets.PARTS.keys()
    rows = torch.cat([part.inputs["x"] for part in split.values()])
    assert len(rows) == len(set(rows.tolist())) == 400
    assert torch.equal(rows, torch.cat([part.inputs["x"] for part in numbered.split(0, 400).values()]))
    assert not torch.equal(rows, torch.cat([part.inputs["x"] for part in numbered.split(1, 400).values()]))
    for one in pictures:
        assert one.inputs["pixels"].shape == (len(one), 3, 32, 32)
        assert one.labels.max() == 9


def test_heads_are_those_of_each_samples_own_set():
    heads, h = stages.Heads(5, [3, 2, 4]), torch.randn(6, 5)
    which, labels = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([2, 1, 3, 0, 0, 1])
    starts, counts = [0, 3, 5], [3, 2, 4]
    logits = heads.all(h)
    for row in range(6):
        own = logits[row, starts[which[row]] : starts[which[row]] + counts[which[row]]]
        want = nn.functional.cross_entropy(own, labels[row])
        even = torch.full((len(own),), 1 / len(own))
        apart = (even * (even.log() - own.log_softmax(dim=0))).sum()
        assert torch.isclose(heads.losses(h, which, labels)[row], want, atol=1e-6)
        assert torch.isclose(heads.even(h, which)[row], apart, atol=1e-6)
        assert heads.right(h, which, labels)[row] == (own.argmax() == labels[row])
    heads.even(h, which).sum().backward()
    assert heads.all.weight.grad.isfinite().all()


def test_fitted_heads_are_scikit_learns(pictures):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    class Rows(nn.Module):
        def forward(self, x):
            return x

    torch.manual_seed(0)
    parts = [
        Labelled("ten", {"x": 3 * torch.randn(200, 4) + 1}, torch.arange(200) % 5, tuple("abcde")),
        Labelled("two", {"x": torch.randn(200, 4)}, torch.arange(200) % 2, ("a", "b")),
    ]
    heads = stages.fitted_heads(Rows(), parts)
    for at, part in enumerate(parts):
        x = part.inputs["x"]
        scaled = StandardScaler().fit_transform(x.numpy())
        want = LogisticRegression(max_iter=2000).fit(scaled, part.labels.numpy()).predict(scaled)
        right = heads.right(x, torch.full((200,), at), torch.from_numpy(want))
        assert right.all()


def test_numbers_that_never_change_get_no_weight():
    torch.manual_seed(0)
    h, labels = torch.randn(90, 4), torch.arange(90) % 3
    h[:, 1], h[:, 2] = 0.5, 1e-33 * h[:, 2]
    w, b = stages.regression(h, labels)
    assert not w[:, 1:3].any()
    assert w.isfinite().all()
    others = stages.regression(h[:, [0, 3]], labels)
    assert torch.equal(w[:, [0, 3]], others[0])
    assert torch.equal(b, others[1])


def test_all_of_it_and_again_from_its_files(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(ways, "STRENGTHS", {way: [0.0, 0.5, 1.0] for way in ways.NEGATIONS})
    monkeypatch.setattr(ways, "SCALES", [0.0, 0.3])
    options = dict(folder=tmp_path, names=("mnist", "digits"), progress=False, say=said.append)
    results = composition.run("images", SMALL, **options)
    assert [one["way"] for one in results.addition] == list(ways.WAYS)
    assert len(results.negation) == 2 * len(ways.NEGATIONS)
    assert len(said) == len(ways.WAYS) + len(results.negation)
    rows = {row["way"]: row for row in results.rows()}
    assert set(rows) == set(ways.WAYS)
    assert rows["zero-shot"]["zeros"] == "100%"
    assert rows["individual"]["zeros"] == "50%"
    for one in results.negation:
        assert 0 <= one["chance"] <= 1
        assert one["strength"] in ways.STRENGTHS[one["way"]]
    assert json.loads((tmp_path / "results.json").read_text())["addition"] == json.loads(json.dumps(results.addition))
    assert all((tmp_path / name).is_file() for name in ("scores.png", "coefficients.png"))

    def never(*_, **__):
        raise AssertionError("made again")

    for module, name in ((stages, "pretrained"), (stages, "finetuned"), (ways, "added"), (ways, "negated")):
        monkeypatch.setattr(module, name, never)
    again = composition.run("images", SMALL, **options)
    assert again.rows() == results.rows()
    assert again.negation_rows() == results.negation_rows()
    with pytest.raises(AssertionError, match="made again"):
        composition.run("images", composition.Options(1, 200, 4, 3, 6e-4, 1, 1), **options)


def test_zero_shot_and_individual_are_what_the_models_themselves_do(tmp_path, pictures):
    """By the base and the finetuned encoder alone."""
    split = [one.split(0, 200) for one in pictures]
    train = [one["train"] for one in split]
    torch.manual_seed(0)
    from copy import deepcopy

    from engine.experiments.composition.encoders import Pictures

    base = stages.pretrained(Pictures(), train, steps=3, lr=1e-3, seed=0, progress=False)
    heads = stages.fitted_heads(base, train)
    before = deepcopy(base.state_dict())
    tuned = [
        stages.finetuned(base, heads, part, at, steps=3, lr=1e-3, seed=0, progress=False)
        for at, part in enumerate(train)
    ]
    assert all(torch.equal(before[name], x) for name, x in base.state_dict().items())
    vectors = composition.running.task_vectors(base, *tuned, names=["mnist", "digits"])
    parts = {name: ways.Part.of(base, [one[name] for one in split]) for name in ("compose", "select", "test")}
    setting = ways.Setting(base, heads, vectors, parts, ("mnist", "digits"), 1, 1, 0, tmp_path, False)
    zero, own = ways.added(setting, "zero-shot"), ways.added(setting, "individual")
    for at, encoder in enumerate(tuned):
        test = split[at]["test"]
        of = torch.full((len(test),), at)
        for found, model in ((zero, base), (own, encoder)):
            h = stages.features_of(model, test)
            assert found.right[at] == heads.right(h, of, test.labels).double().mean().item()


def test_the_command(tmp_path):
    asked = ["weights", "images", "--set", "digits", "--set", "mnist", "--way", "zero-shot", "--way", "router"]
    sizes = ["--no-negation", "--seeds", "1", "--samples", "150", "--epochs", "1", "--quiet", "--out", str(tmp_path)]
    composition.DEFAULTS["images"], kept = SMALL, composition.DEFAULTS["images"]
    try:
        answer = CliRunner().invoke(app, asked + sizes)
    finally:
        composition.DEFAULTS["images"] = kept
    assert answer.exit_code == 0, answer.output
    assert "router" in answer.output
    wrong = CliRunner().invoke(app, ["weights", "sounds"])
    assert wrong.exit_code == 1
    assert "expected one of images, texts" in wrong.output


def tarred(files):
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return found.getvalue()


def debian(files):
    """An ar archive: a member of odd size before the data."""
    data, found = tarred(files), b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.gz", data)):
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        found += head + content + b"\n" * (len(content) % 2)
    return found


def test_archives(tmp_path):
    path = tmp_path / "a.deb"
    path.write_bytes(debian({"./usr/one.txt": b"first", "./usr/two.txt": b"second"}))
    assert fetching.files_of(path, {"b": "two.txt"}) == {"b": b"second"}
    with pytest.raises(ValueError, match=r"no three\.txt"):
        fetching.files_of(path, {"c": "three.txt"})


def test_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADPATCH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "package.tgz"
    source.write_bytes(b"content")
    package = fetching.Package(source.as_uri(), hashlib.sha256(b"content").hexdigest(), 1)
    assert fetching.fetched(package).read_bytes() == b"content"
    source.unlink()
    assert fetching.fetched(package).read_bytes() == b"content"
    package.path.write_bytes(b"other")
    with pytest.raises(ValueError, match="another file"):
        fetching.fetched(package)
    package.path.unlink()
    with pytest.raises(OSError, match=r"cannot be fetched .* put that file at .*package\.tgz"):
        fetching.fetched(package)


def test_texts_of_archives(tmp_path, monkeypatch):
    rows = '1\t2.5\tA "fine" film\n2\t0.2\ta film\n3\t-1.5\ta café of a film\n'
    inner = tarred({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": rows.encode("latin-1")})
    (tmp_path / "v.tgz").write_bytes(tarred({"v/hutto_ICWSM_2014.tar.gz": inner}))
    monkeypatch.setattr(sets, "fetched", lambda _: tmp_path / "v.tgz")
    said, labels, _ = sets._rated("movieReviewSnippets")
    assert said == ['A "fine" film', "a café of a film"]
    assert labels == [1, 0]
    nouns = "".join(f"  {n} licence\n" for n in range(2))
    nouns += "".join(f"{n:08} {n % 12:02} n 01 thing 0 000 | gloss {n}; an example  \n" for n in range(240))
    (tmp_path / "v.tgz").write_bytes(tarred({"usr/share/wordnet/data.noun": nouns.encode()}))
    said, labels, classes = sets._glosses()
    assert len(classes) == sets.GLOSSES
    assert len(said) == len(labels) == 200
    assert said[0].startswith("gloss ")
    assert ";" not in said[0]
    assert set(labels) == set(range(10))


def test_fashion_of_an_archive(tmp_path, monkeypatch):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8)
    files = {
        "t10k-images-idx3-ubyte.gz": gzip.compress(bytes(16) + pixels.tobytes()),
        "t10k-labels-idx1-ubyte.gz": gzip.compress(bytes(8) + bytes([3, 9])),
    }
    (tmp_path / "f.deb").write_bytes(debian(files))
    monkeypatch.setattr(sets, "fetched", lambda _: tmp_path / "f.deb")
    found = sets._fashion()
    assert found.labels.tolist() == [3, 9]
    assert found.classes[9] == "Ankle boot"
