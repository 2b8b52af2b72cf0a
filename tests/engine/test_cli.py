"""The command line end to end, small, on the real model or a random one of its layers: files, answers, errors."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer import Exit
from typer.testing import CliRunner

import engine
import models
from engine import TaskVector
from engine.cli import app, console, plain_errors


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a small `extract` on a task file of one's own leaves behind."""
    folder = tmp_path_factory.mktemp("extract")
    words = ["one two", "three four", "five six", "seven eight", "nine ten", "up down", "in out", "on off"] * 2
    lines = [json.dumps({"input": f"{i} {w.split()[0]}", "output": w.split()[1]}) for i, w in enumerate(words)]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    options = dict(task=folder / "mine.jsonl", steps=3, shots=2, prompts=4, rollouts=4, out=folder / "out")
    options |= {"icl-shots": 2, "candidates": "thresholds", "lr": 0.2}
    result = run("extract", *(part for key, value in options.items() for part in (f"--{key}", value)))
    assert result.exit_code == 0, result.output
    assert "zero-shot + MTV" in result.output
    assert "exact" in result.output
    assert "first" in result.output
    return folder / "out"


def test_extract_leaves_whole_files(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["curve.png", "heads.png", "results.json", "vector.safetensors"]
    results = json.loads((folder / "results.json").read_text())
    assert [score["name"] for score in results["scores"]] == ["zero-shot", "2-shot ICL", "zero-shot + MTV"]
    assert all(0 <= score["exact"]["accuracy"] <= score["first_token"]["accuracy"] <= 1 for score in results["scores"])
    assert all(score["tokens"] > 1 and score["seconds"] > 0 for score in results["scores"])
    assert len(results["losses"]) == results["steps"] == 3
    vector = TaskVector.load(folder / "vector.safetensors")
    assert [tuple(head) for head in results["heads"]] == vector.heads
    assert vector.metadata["task"] == "mine"
    assert vector.metadata["lr"] == 0.2
    for picture in ("heads.png", "curve.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 300


def test_apply_and_info(folder):
    for patched in ("prompt", "all", 2):
        result = run("apply", folder / "vector.safetensors", "up", "--max-new-tokens", 3, "--patched", patched)
        assert result.exit_code == 0, result.output
    assert "with the vector" in result.output
    result = run("info", folder / "vector.safetensors")
    assert result.exit_code == 0
    assert "smollm2-135m" in result.output


def test_apply_with_anothers_means_after_demonstrations(folder):
    vector = folder / "vector.safetensors"
    result = run(
        "apply", vector, "up", "--values-from", vector, "--shot", "in=out", "--shot", "on=off", "--max-new-tokens", 2
    )
    assert result.exit_code == 0, result.output


def test_heads_of_another_task_on_top_of_one_shot(folder, tmp_path):
    """The heads given, means of this task's own: nothing is searched for."""
    options = {"task": folder.parent / "mine.jsonl", "shots": 2, "prompts": 4, "icl-shots": 2, "query-shots": 1}
    options |= {"heads-from": folder / "vector.safetensors", "out": tmp_path, "seed": 1}
    result = run("extract", *(part for key, value in options.items() for part in (f"--{key}", value)))
    assert result.exit_code == 0, result.output
    found, given = (TaskVector.load(where / "vector.safetensors") for where in (tmp_path, folder))
    assert found.heads == given.heads
    assert not found.values.equal(given.values)
    assert found.metadata["heads_of"] == "mine"
    results = json.loads((tmp_path / "results.json").read_text())
    assert [score["name"] for score in results["scores"]] == ["1-shot", "2-shot ICL", "1-shot + MTV"]
    assert not (tmp_path / "curve.png").exists()


def test_extract_by_gates(folder, small_folder, tmp_path):
    options = {"task": folder.parent / "mine.jsonl", "shots": 2, "prompts": 4, "icl-shots": 2, "steps": 2}
    options |= {
        "model": small_folder,
        "estimator": "relaxed",
        "prompts-per-step": 2,
        "loss": "answer",
        "patched": "all",
        "out": tmp_path,
    }
    result = run("extract", *(part for key, value in options.items() for part in (f"--{key}", value)))
    assert result.exit_code == 0, result.output
    assert TaskVector.load(tmp_path / "vector.safetensors").metadata["estimator"] == "relaxed"
    assert json.loads((tmp_path / "results.json").read_text())["loss"] == "answer"


def test_fv(folder, small_folder, tmp_path):
    options = dict(
        task=folder.parent / "mine.jsonl", model=small_folder, k=3, shots=2, prompts=4, shuffled=1, out=tmp_path / "out"
    )
    result = run("fv", *(part for key, value in options.items() for part in (f"--{key}", value)))
    assert result.exit_code == 0, result.output
    assert "shuffled labels" in result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["zero-shot"]["by_layer"]) == 30
    assert len(results["heads"]) == 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "vector.safetensors", "effects.safetensors", "heads.png", "layers.png", "results.json",
    }  # fmt: skip
    assert run("fv", "--task", folder.parent / "mine.jsonl", "--k", 999, "--out", tmp_path / "no").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extract", "--task", "synonyms"], "no task 'synonyms'"),
        (["extract", "--preset", "thesis", "--out", "OUT"], "preset must be one of"),
        (["extract", "--estimator", "guess", "--out", "OUT"], "estimator must be one of"),
        (["extract", "--loss", "all", "--out", "OUT"], "--loss must be one of"),
        (["extract", "--patched", "most", "--out", "OUT"], "--patched must be 'prompt', 'all' or a number"),
        (["extract", "--estimator", "relaxed", "--rollouts", "32", "--out", "OUT"], "draws no masks"),
        (["extract", "--heads-from", "missing.safetensors"], "no such file"),
        (["apply", "missing.safetensors", "hot", "--shot", "hot"], "no such file"),
        (["extract", "--model", "gpt-17"], "cannot open the model 'gpt-17'"),
        (["extract", "--shots", "1000"], "1000 shots"),
        (["apply", "missing.safetensors", "hot"], "no such file"),
        (["info", __file__], "truncated"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("said", ["expected [rows, 6], got [/tmp/x] and [red]", "no such file: a[/b].txt :smile:"])
def test_an_error_is_told_whole(said, capsys):
    """Brackets in it are no markup, whether rich knows the tag or not."""
    with pytest.raises(Exit), plain_errors():
        raise ValueError(said)
    assert capsys.readouterr().err == f"error: {said}\n"


def test_brackets_are_printed(tmp_path, monkeypatch, small_folder, capsys):
    """In what users give and models answer: lines of progress, cells, titles and paths."""
    words = "[/INST] [bold] [0, 1] :smile:"
    lm = models.load(small_folder)
    shape = (lm.shape.n_layers, lm.shape.n_heads)
    means = torch.zeros(*shape, lm.shape.head_dim)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, 0] = True
    path = tmp_path / "a[/b]" / "vector.safetensors"
    TaskVector(mask, means, mask.float(), {"model": str(small_folder), "task": words, words: 1}).save(path)
    result = run("info", path)
    assert result.exit_code == 0, result.output
    assert result.output.count(words) == 2
    monkeypatch.setattr(engine, "generate", lambda _, prompts, **__: [words for _ in prompts])
    result = run("apply", path, "[/a]", "--model", small_folder)
    assert result.exit_code == 0, result.output
    assert "[/a]" in result.output
    assert result.output.count("[/INST]") == result.output.count("[bold]") == 2
    capsys.readouterr()
    console.say(words)
    console.list_files(tmp_path / "a[/b]", ["[red].png"])
    shown = capsys.readouterr()
    assert shown.err == f"{words}\n"
    assert shown.out.replace("\n", "").endswith("a[/b]/[red].png")


def test_unwritable_out(tmp_path):
    """Said before the model is opened: nothing is computed for results that could not be kept."""
    (tmp_path / "file").write_text("")
    result = run("extract", "--out", tmp_path / "file")
    assert result.exit_code == 1
    assert "is a file, expected a folder" in result.output


def test_help_starts_without_the_libraries_it_does_not_need():
    """`import engine` is light: plotting and statistics are imported where they are used."""
    heavy = ("matplotlib", "scipy", "typer", "nnsight", "transformer_lens")
    code = f"import sys, engine, models; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_trace(small_folder, tmp_path):
    """Named positions by default; a table, a picture, a page and the effects themselves."""
    out = tmp_path / "trace"
    result = run("trace", "--model", small_folder, "--task", "agreement", "--count", 2, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert "effect on the logit difference" in result.output
    assert sorted(p.name for p in out.iterdir()) == ["effects.html", "effects.safetensors", "map.png"]
    effects = engine.Effects.load(out / "effects.safetensors")
    assert (list(effects.positions), effects.patched.shape) == (["subject", "attractor", "end"], (2, 3, 30))
    for given, said in (
        (["--positions", "first"], "--positions must be named, all, together or last, got 'first'"),
        (["--count", 0], "count"),
    ):
        result = run("trace", "--quiet", "--out", tmp_path / "none", *given)
        assert (result.exit_code, said in result.output) == (1, True), result.output


@pytest.mark.parametrize("rank", ["attribution", pytest.param("edges", marks=pytest.mark.slow)])
def test_circuit(small_folder, tmp_path, rank):
    out = tmp_path / "circuit"
    result = run("circuit", "--model", small_folder, "--count", 2, "--rank", rank, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert "CPR" in result.output
    assert sorted(p.name for p in out.iterdir()) == [
        "curve.png", "curve.safetensors", "ranking.safetensors", "results.json",
    ]  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["faithfulness"][-1] == 1
    assert engine.circuits.Faithfulness.load(out / "curve.safetensors").cpr == results["cpr"]
    result = run("circuit", "--rank", "size", "--out", out)
    assert (result.exit_code, "--rank must be one of" in result.output) == (1, True)


@pytest.mark.parametrize("count", [1, 2])
def test_circuit_of_one_pair_has_no_interval(small_folder, tmp_path, count):
    result = run("circuit", "--model", small_folder, "--count", count, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0, result.output
    assert ("interval" in result.output) == (count > 1)
    assert (tmp_path / "results.json").exists()
