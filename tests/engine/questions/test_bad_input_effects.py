"""Bad input to metrics and effects is refused by the documented exception, in words that say what was given and what
was expected.
"""

import numpy as np
import pytest
import torch

import engine
from engine.artifacts import save_tensors
from engine.questions.effects import Effects
from engine.questions.metrics import METRICS, read_metric


def said(error, *words):
    """`pytest.raises` with all the words in the message."""
    return pytest.raises(error, match="".join(f"(?=.*{word})" for word in words))


@pytest.mark.parametrize("metric", ["accuracy", "", None, "Rank", 3])
def test_unknown_metric(metric):
    with said(ValueError, repr(metric), "log_probability", "function of the logits"):
        read_metric(metric, [1], prompts=1, vocab_size=9)


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"kl"}))
def test_targets(metric):
    others = [3, 4]
    with said(ValueError, metric, "needs targets", "2 prompts"):
        read_metric(metric, None, others, prompts=2, vocab_size=9)
    with said(ValueError, "targets", "got 1 for 2 prompts"):
        read_metric(metric, [1], others, prompts=2, vocab_size=9)
    for token in (9, -1):
        with said(ValueError, f"token {token} in targets", "prompt 1", "vocabulary of 9"):
            read_metric(metric, [1, token], others, prompts=2, vocab_size=9)
    for token in (1.0, "a", True, None):
        with said(TypeError, "targets must be token ids", f"{token!r} for prompt 0"):
            read_metric(metric, [token, 1], others, prompts=2, vocab_size=9)


def test_others():
    with said(ValueError, "'logit_difference' needs others"):
        read_metric("logit_difference", [1, 2], prompts=2, vocab_size=9)
    with said(ValueError, "others", "got 3 for 2 prompts"):
        read_metric("logit_difference", [1, 2], [3, 4, 5], prompts=2, vocab_size=9)
    with said(ValueError, "token 9 in others", "prompt 0"):
        read_metric("logit_difference", [1, 2], [9, 1], prompts=2, vocab_size=9)
    with said(ValueError, r"same for prompts \[1\]"):
        read_metric("logit_difference", [1, 2], [2, 2], prompts=2, vocab_size=9)
    read_metric("kl", prompts=2, vocab_size=9)


PATCHED, CLEAN = torch.zeros(5, 3, 6), torch.zeros(5)
MASK = torch.zeros(3, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(patched=torch.zeros(5)), (r"\[prompts, layers, heads\]", r"got \[5\]")),
        (dict(patched=torch.zeros(5, 6), positions=[0]), (r"\[prompts, positions, layers, heads\]", r"got \[5, 6\]")),
        (dict(tokens=["a"]), ("tokens must be one for each of the positions None",)),
        (dict(patched=torch.zeros(5, 2, 3, 6)), (r"\[prompts, layers, heads\]", r"got \[5, 2, 3, 6\]")),
        (dict(positions=[0]), ("3 positions, but 1 were named",)),
        (dict(groups={"all": MASK}), (r"\[prompts, groups\]", r"got \[5, 3, 6\]")),
        (dict(patched=torch.zeros(0, 3, 6), clean=torch.zeros(0)), ("none of them 0", r"got \[0, 3, 6\]")),
        (dict(clean=torch.zeros(4)), (r"clean must have shape \[5\]", r"got \[4\]")),
        (dict(clean=torch.zeros(5, 1)), (r"clean must have shape \[5\]", r"got \[5, 1\]")),
        (dict(reference=torch.zeros(6)), (r"reference must have shape \[5\]", r"got \[6\]")),
        (dict(patched=torch.zeros(5, 2, 3, 6), positions=[0, 1, 2]), ("2 positions, but 3 were named",)),
        (dict(patched=torch.zeros(5, 2), groups={"all": MASK}), ("2 groups, but 1 were named",)),
        (dict(patched=torch.zeros(5, 1), groups={"all": MASK.long()}), ("groups must be bool masks",)),
        (dict(patched=torch.zeros(5, 2), groups={"a": MASK, "b": MASK[:2]}), ("groups must be bool masks",)),
    ],
)
def test_fields_that_do_not_fit(fields, words):
    with said(ValueError, *words):
        Effects(**dict(patched=PATCHED, clean=CLEAN) | fields)


@pytest.mark.parametrize("name", ["patched", "clean", "reference"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(name, number):
    fields = dict(patched=PATCHED.clone(), clean=CLEAN.clone(), reference=CLEAN.clone())
    fields[name][2] = number
    fields[name][4] = number
    with said(ValueError, f"kl of the {name} run is NaN or infinite", r"prompts \[2, 4\]"):
        Effects(**fields, metric="kl")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_precision(dtype):
    with said(TypeError, "patched must be of float32 or float64", str(dtype)):
        Effects(PATCHED.to(dtype), CLEAN)
    with said(TypeError, "clean must be of float32 or float64", str(dtype)):
        Effects(PATCHED, CLEAN.to(dtype))


def test_one_prompt():
    one = Effects(PATCHED[:1], CLEAN[:1])
    for statistic in (lambda: one.standard_error, one.interval, one.p_values, one.summary):
        with said(ValueError, "at least 2 prompts, got 1"):
            statistic()
    assert one.mean.shape == (3, 6)


def test_options():
    effects = Effects(torch.rand(5, 3, 6), CLEAN)
    for level in (0, 1, 95, -0.1):
        with said(ValueError, "level", f"got {level}"):
            effects.interval(level)
    for resamples in (0, -5):
        with said(ValueError, "resamples", f"got {resamples}"):
            effects.interval(resamples=resamples)
        with said(ValueError, "resamples", f"got {resamples}"):
            effects.p_values(resamples=resamples)
    with pytest.warns(UserWarning, match="intervals of 18 units are NaN: 1 resamples of 5 prompts"):
        effects.interval(resamples=1)
    with said(ValueError, "correction must be one of", "'max', 'holm', 'fdr'", "got 'bonferroni'"):
        effects.p_values("bonferroni")
    with said(ValueError, "by must be one of", "'absolute'", "got 'signed'"):
        effects.top(3, "signed")
    for k in (0, 19, -1):
        with said(ValueError, "1 to 18", f"got {k}"):
            effects.top(k)


def test_rank_correlation():
    effects = Effects(torch.rand(5, 3, 6), CLEAN)
    with said(ValueError, "same units", "5 layers x 6 heads"):
        effects.rank_correlation(Effects(torch.rand(5, 5, 6), CLEAN))
    with said(ValueError, "same units"):
        effects.rank_correlation(Effects(torch.rand(5, 1, 3, 6), CLEAN, positions=[-1]))
    with said(ValueError, r"shape \[3, 6\], got \[6, 3\]"):
        effects.rank_correlation(torch.rand(6, 3))
    with said(ValueError, "effects differ"):
        effects.rank_correlation(torch.ones(3, 6))


def test_no_reference():
    with said(ValueError, "reference run", "none"):
        _ = Effects(PATCHED, CLEAN).normalised


def test_maps_are_of_heads(tmp_path):
    with said(ValueError, "single heads", "groups"):
        Effects(torch.zeros(5, 1), CLEAN, groups={"all": MASK}).heatmap(tmp_path / "map.png")
    with said(ValueError, "1 to 18", "got 19"):
        Effects(PATCHED, CLEAN).heatmap(tmp_path / "map.png", top=19)
    with said(ValueError, "does not hold 400 maps of 6 x 3", "fewer positions"):
        Effects(torch.zeros(5, 400, 3, 6), CLEAN, positions=range(400)).heatmap(tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_pages(tmp_path, monkeypatch):
    """Refused before anything is resampled, and no file is left."""
    effects, path = Effects(torch.rand(5, 3, 6), CLEAN), tmp_path / "page.html"
    for top in (0, -3, 2.5, None):
        with said(ValueError, "top must be a positive integer", f"got {top!r}"):
            effects.show(path, top=top)
    with said(ValueError, "correction must be one of", "got 'bonferroni'"):
        effects.show(path, correction="bonferroni")
    with said(ValueError, "level", "got 95"):
        effects.show(path, level=95)
    with said(ValueError, "resamples", "got 0"):
        effects.show(path, resamples=0)
    with said(ValueError, "seed must be an integer", "got 0.5"):
        effects.show(path, seed=0.5)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        effects.show(tmp_path / "file" / "page.html", resamples=9)


def test_files(tmp_path):
    with said(FileNotFoundError, "no such file"):
        Effects.load(tmp_path / "none.safetensors")
    vector = engine.TaskVector(MASK, torch.zeros(3, 6, 8), torch.zeros(3, 6))
    vector.save(tmp_path / "vector.safetensors")
    with said(ValueError, "vector.safetensors", "patched, clean"):
        Effects.load(tmp_path / "vector.safetensors")
    path = tmp_path / "effects.safetensors"
    Effects(PATCHED, CLEAN).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with said(ValueError, "truncated"):
        Effects.load(path)


@pytest.mark.parametrize(
    ("metadata", "lacking"),
    [
        ({"model": "tiny"}, "'groups'"),
        ({"groups": None}, "'reference'"),
        ([1], "list indices"),
        (
            {"groups": ["a"], "masks": False, "reference": False, "positions": None, "metric": "m", "metadata": {}},
            "shape",
        ),
        ({"groups": ["a"], "reference": True}, "truncated"),
    ],
)
def test_a_file_of_something_else(tmp_path, metadata, lacking):
    """As a sweep's checkpoint: tensors of the same names, described in another way."""
    path = tmp_path / "other.safetensors"
    save_tensors(path, {"patched": PATCHED, "clean": CLEAN}, metadata)
    with said(ValueError, "other.safetensors", "no effects", lacking):
        Effects.load(path)
    save_tensors(path, {"metric": PATCHED, "full": CLEAN, "empty": CLEAN}, metadata)
    with said(ValueError, "other.safetensors", "no faithfulness"):
        engine.circuits.Faithfulness.load(path)


def test_positions_of_an_array(tmp_path):
    effects = Effects(PATCHED[:, None], CLEAN, positions=np.array([4]), metadata={"seed": np.int64(3)})
    effects.save(tmp_path / "e")
    loaded = Effects.load(tmp_path / "e")
    assert (loaded.positions, loaded.metadata) == ([4], {"seed": 3})
