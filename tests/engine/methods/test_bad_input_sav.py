"""What no classifier can be made of is refused before anything is computed."""

import pytest
import torch

import models
from engine.methods import sav
from engine.methods.sav import SparseAttentionVectors
from models import zoo

PROMPTS, LABELS = ["ab", "cd", "efg"], ["x", "y", "x"]


@pytest.fixture
def nothing_runs(monkeypatch):
    def capture(*_):
        raise AssertionError("the model was run")

    monkeypatch.setattr(sav, "capture", capture)


@pytest.fixture
def fitted(model):
    return SparseAttentionVectors(model, 3).fit(PROMPTS, LABELS)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("prompts", "labels", "error", "said"),
    [
        (PROMPTS, ["x", "x", "x"], ValueError, r"two classes, got only \['x'\]"),
        (PROMPTS, [4, 4, 4], ValueError, r"two classes, got only \[4\]"),
        (PROMPTS, ["x", "y"], ValueError, "3 prompts and 2 labels"),
        (PROMPTS[:2], LABELS, ValueError, "2 prompts and 3 labels"),
        ([], [], ValueError, "no prompts"),
        ("abc", LABELS, TypeError, "got one string"),
        (PROMPTS, ["x", 1, "y"], TypeError, "all strings or all integers, got int, str"),
        (PROMPTS, [True, False, True], TypeError, "all integers, got bool"),
        (PROMPTS, [0.5, 1.0, 0.5], TypeError, "all integers, got float"),
        (PROMPTS, ["x", None, "y"], TypeError, "NoneType"),
        (torch.zeros(3, 3, 6, 7), LABELS, ValueError, r"\[prompts, 3, 6, 8\], got \[3, 3, 6, 7\]"),
        (torch.zeros(3, 6, 8), LABELS, ValueError, r"\[prompts, 3, 6, 8\], got \[3, 6, 8\]"),
    ],
)
def test_examples(model, prompts, labels, error, said):
    with pytest.raises(error, match=said):
        SparseAttentionVectors(model, 3).fit(prompts, labels)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("heads", [0, 19, -1, 2.0, None])
def test_heads(model, heads):
    with pytest.raises(ValueError, match=rf"from 1 to 18, .*got {heads!r}"):
        SparseAttentionVectors(model, heads).fit(PROMPTS, LABELS)


@pytest.mark.usefixtures("nothing_runs")
def test_not_fitted(model, tmp_path):
    raw = SparseAttentionVectors(model, 3)
    calls = [
        lambda: raw.predict(PROMPTS),
        lambda: raw.predict_proba(PROMPTS),
        lambda: raw.score(PROMPTS, LABELS),
        lambda: raw.save(tmp_path / "x"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="not fitted yet"):
            call()
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite(model, fitted, monkeypatch):
    z = torch.zeros(3, 3, 6, 8)
    z[1, 0, 2, 5], z[2, 2, 2, 2] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"prompts \[1, 2\] are NaN or infinite"):
        SparseAttentionVectors(model, 3).fit(z, LABELS)
    with pytest.raises(ValueError, match=r"prompts \[1, 2\] are NaN or infinite"):
        fitted.predict(z)
    monkeypatch.setattr(sav, "AT_ONCE", 2)
    with pytest.raises(ValueError, match=r"prompts \[2\] are NaN or infinite"):
        fitted.predict(torch.cat([z[:1], z[:1], z[2:]]))


def test_predict(fitted):
    with pytest.raises(ValueError, match="no prompts"):
        fitted.predict([])
    with pytest.raises(TypeError, match="one string"):
        fitted.predict("abc")
    with pytest.raises(ValueError, match="2 prompts and 3 labels"):
        fitted.score(PROMPTS[:2], LABELS)
    with pytest.raises(ValueError, match=r"got \[1, 6, 8\]"):
        fitted.predict(torch.zeros(1, 6, 8))


def test_parameters(fitted):
    with pytest.raises(ValueError, match="parameters are model, heads, got 'k'"):
        fitted.set_params(k=3)


def test_files(fitted, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        SparseAttentionVectors.load(tmp_path / "none", model)
    fitted.save(tmp_path / "x")
    other = models.wrap(zoo.tiny("qwen3"), zoo.tiny_tokenizer(), name="tiny-qwen3")
    with pytest.raises(ValueError, match=r"'tiny-llama', heads \[3, 6\]; it does not fit 'tiny-qwen3'"):
        SparseAttentionVectors.load(tmp_path / "x", other)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated"):
        SparseAttentionVectors.load(tmp_path / "x", model)
