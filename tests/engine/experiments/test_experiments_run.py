"""Runs of experiments by their data and their command line: families, official layouts, killed runs that go on."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import engine
import models
from engine.cli import app
from engine.experiments.setting import Setting, Way
from engine.methods import mtv
from engine.tasks import Pair, Task
from models import zoo
from tests.experiments import COLOURS, SMALL, Page, picture, picture_task, ran, ways, without_image_answers


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics2", "idefics3", "llava_onevision"])
def test_families_go_through_main(seeing, tmp_path, family):
    results = ran("main", seeing(family), [picture_task()], tmp_path)
    assert ways(results) == ["zero-shot", "2-shot ICL", "zero-shot + MTV", "zero-shot + random heads"]
    assert all(0 <= record["accuracy"] <= record["within"] <= 1 for record in results.records)
    said = json.loads((tmp_path / "results.json").read_text())
    assert said["records"] == results.records
    assert said["options"]["shots"] == 2
    assert said["versions"]["torch"]
    vector = engine.TaskVector.load(tmp_path / "vectors" / "hue-0-mtv.safetensors", seeing(family))
    assert len(vector.metadata["losses"]) == SMALL.steps
    page = Page((tmp_path / "report.html").read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 + 4  # questions; scores of first tokens, of strings, heads, curve
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link")]
    assert not list((tmp_path / "vectors").glob(".*"))


@pytest.mark.parametrize("family", ["idefics2", "idefics3"])
def test_command_line_on_a_saved_model(tmp_path, monkeypatch, family):
    """By `--model FOLDER`. Qwen2-VL and LLaVA-OneVision do not load from a folder without torchvision."""
    without_image_answers(zoo.tiny(family)).save_pretrained(tmp_path / "model")
    zoo.tiny_processor(family).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(engine.tasks, "load", lambda name, folder: picture_task(name))
    arguments = ["experiment", "main", "--model", tmp_path / "model", "--task", "hue", "--out", tmp_path / "out"]
    sizes = dict(seeds=2, shots=2, examples=3, steps=2, queries=4)
    arguments += [part for key, value in sizes.items() for part in (f"--{key}", value)]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "zero-shot + MTV" in result.output
    assert "±" in result.output
    assert str(tmp_path / "out" / "report.html") in result.output


def vizwiz_folder(folder):
    (folder / "Annotations").mkdir(parents=True)
    for part, n in (("train", 8), ("val", 3)):
        (folder / part).mkdir()
        records = []
        for index in range(n):
            picture(index).save(folder / part / f"{index}.png")
            answers = [{"answer": "unanswerable" if index % 2 else COLOURS[k % 3]} for k in range(10)]
            records.append({"image": f"{index}.png", "question": "what is it?", "answers": answers})
        (folder / "Annotations" / f"{part}.json").write_text(json.dumps(records))
    return folder


def cub_folder(folder):
    lines = {"images": [], "image_class_labels": [], "train_test_split": []}
    for index in range(16):
        number, kind = index + 1, index % 2 + 1
        path = folder / "images" / f"00{kind}.k{kind}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
        lines["images"].append(f"{number} {path.relative_to(folder / 'images')}")
        lines["image_class_labels"].append(f"{number} {kind}")
        lines["train_test_split"].append(f"{number} {int(index < 10)}")
    lines["classes"] = ["1 001.k1", "2 002.k2"]
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return folder


@pytest.mark.filterwarnings("ignore:.*begin with the same token")
@pytest.mark.parametrize(("name", "make"), [("vizwiz", vizwiz_folder), ("cub", cub_folder)])
def test_data_sets_in_their_official_layout(tmp_path, monkeypatch, seeing, name, make):
    """`headpatch experiment NAME --data FOLDER`: the prompts of appendix C, the VQA accuracy, the 1-shot pair."""
    data, out = make(tmp_path / "data"), tmp_path / "out"
    monkeypatch.setattr(models, "load", lambda *_, **__: seeing("idefics2"))
    sizes = dict(data=data, seeds=1, examples=2, steps=1, queries=3, out=out)
    sizes |= {"shots": 1} if name == "vizwiz" else {}  # four would not fit into the tiny model's 512 tokens
    result = CliRunner().invoke(
        app, ["experiment", name, *(str(part) for key, value in sizes.items() for part in (f"--{key}", value))]
    )
    assert result.exit_code == 0, result.output
    records = json.loads((out / "results.json").read_text())["records"]
    assert [record["way"] for record in records] == (
        ["zero-shot", "1-shot ICL", "zero-shot + MTV", "zero-shot + random heads"]
        if name == "vizwiz"
        else ["1-shot", "1-shot + MTV", "1-shot + random heads"]
    )
    assert {record["within"] is None for record in records} == {name == "vizwiz"}
    assert ("unanswerable" in (out / "report.html").read_text()) == (name == "vizwiz")


def test_open_answers_are_scored_by_all_annotators(seeing, tmp_path):
    """The text that is generated, in each way, by the VQA accuracy: here 2 of 10 annotators agree with it, 0.6."""
    task = picture_task(open_ended=True)
    setting = Setting(seeing(), task, 0, SMALL, tmp_path, progress=False)
    patched = Way("patched", torch.ones(setting.vector().mask.shape, dtype=torch.bool), setting.vector().values)
    options = dict(max_new_tokens=10, stop=["\n", "."], patched="all")  # as the reference code
    for way in (Way("plain"), patched):
        said = [
            engine.generate(seeing(), example.prompt, heads=None if way.mask is None else way.mask[None],
                            values=way.values, **options)
            for example in setting.queries(0)
        ]  # fmt: skip
        test = tuple(
            replace(question, answers=(*[answer] * 2, *["else"] * 8))
            for question, answer in zip(setting.held_out, said, strict=True)
        )
        asked = replace(setting, task=replace(task, test=test))
        found = {record["way"]: record["accuracy"] for record in asked.ask(asked.queries(0), [Way("plain"), patched])}
        assert found[way.name] == pytest.approx(0.6)


def test_methods_go_on_where_they_were(model, tmp_path):
    """Of a run that was stopped before its part was written: vectors and their costs are kept, nothing is searched."""
    task = Task("next", tuple(Pair(chr(97 + i), chr(98 + i)) for i in range(16)))
    first = ran("methods", model, [task], tmp_path)
    assert "SAV" not in ways(first)  # it has no labels
    found = sorted(path.name for path in (tmp_path / "vectors").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors").iterdir()}
    assert found == [
        f"next-0-{name}.safetensors" for name in ("fv", "learned", "linear", "mtv-gates", "mtv", "stv", "vtv")
    ]
    (tmp_path / "parts" / "methods-next-0.json").unlink()
    assert ran("methods", model, [task], tmp_path).records == first.records
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    by_way = {record["way"]: record for record in first.records}
    for record in first.records:
        assert ("distance" in record) == (record["way"] != "2-shot ICL")
        if record["way"] in ("zero-shot", "2-shot ICL", "zero-shot + random heads"):
            assert "search_tokens" not in record
            continue
        assert record["search_tokens"] >= record["prompt_tokens"] >= 0
        assert record["search_seconds"] > 0
    # By hand: 3 questions, each with two demonstrations before it and alone, read once; then 2 steps of 32 rollouts on
    # prefixes of two of the three, and 10 candidates on 3 validation questions.
    setting = Setting(model, task, 0, SMALL, tmp_path, progress=False)
    alone = [len(model.encode(example.prompt)) for example in setting.task.queries(setting.split.train[:3], (), 0)]
    shown = setting.task.queries(setting.split.train[:3], setting.split.train, 2, 0)
    pairs = sum(alone) + sum(len(model.encode(example.prompt)) for example in shown)
    assert by_way["zero-shot + STV"]["prompt_tokens"] == pairs
    assert by_way["zero-shot + STV"]["search_tokens"] < pairs + 2 * 33 + sum(alone) + 3 * (max(alone) + 10)
    apart = engine.linear.distance(model, setting.queries(0), setting.queries(2)).mean().item()
    assert by_way["zero-shot"]["distance"] == pytest.approx(apart, abs=1e-6)


def test_a_killed_run_goes_on(seeing, tmp_path, monkeypatch):
    """Killed after a part, then within a search: the same scores and vectors as of a run that was not."""
    options = replace(SMALL, seeds=2, steps=13)
    whole = ran("main", seeing(), [picture_task()], tmp_path / "whole", options)

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran("main", seeing(), [picture_task()], tmp_path / "killed", options, say=stop)
    update, searched = mtv.Search.update, []

    def die(self, *arguments):
        searched.append(self.step)
        if self.step == 11:
            raise KeyboardInterrupt
        update(self, *arguments)

    monkeypatch.setattr(mtv.Search, "update", die)
    with pytest.raises(KeyboardInterrupt):
        ran("main", seeing(), [picture_task()], tmp_path / "killed", options)
    assert searched == list(range(12))  # the second part only
    searched.clear()
    monkeypatch.setattr(mtv.Search, "update", lambda self, *a: (searched.append(self.step), update(self, *a))[1])
    resumed = ran("main", seeing(), [picture_task()], tmp_path / "killed", options)
    assert searched == [10, 11, 12]
    assert resumed.records == whole.records
    tables = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert tables[0] == tables[1]
    for seed in range(2):
        first, second = (
            engine.TaskVector.load(tmp_path / name / "vectors" / f"hue-{seed}-mtv.safetensors")
            for name in ("whole", "killed")
        )
        assert first.mask.equal(second.mask)
        assert first.values.equal(second.values)


def test_other_sizes_or_questions_are_done_anew(seeing, tmp_path, monkeypatch):
    calls = []
    extract = mtv.extract
    monkeypatch.setattr(mtv, "extract", lambda *a, **k: (calls.append(1), extract(*a, **k))[1])
    ran("main", seeing(), [picture_task()], tmp_path)
    ran("main", seeing(), [picture_task()], tmp_path)
    assert len(calls) == 1
    ran("main", seeing(), [picture_task()], tmp_path, replace(SMALL, steps=3))
    ran("main", seeing(), [picture_task(n_test=6)], tmp_path, replace(SMALL, steps=3))
    assert len(calls) == 3
    part = tmp_path / "parts" / "main-hue-0.json"
    part.write_text(part.read_text()[:100])  # not ours, or an older one
    ran("main", seeing(), [picture_task(n_test=6)], tmp_path, replace(SMALL, steps=3))
    assert len(calls) == 3  # the vector is kept by itself
    assert json.loads(part.read_text())["records"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mains"], "no experiment 'mains'"),
        (["transfer", "--task", "antonyms"], "needs 2 or more tasks"),
        (["main", "--task", "antonyms", "--task", "antonyms"], "each once"),
        (["vizwiz"], "expected --data FOLDER"),
        (["flowers", "--data", "missing", "--task", "antonyms"], "no --task"),
        (["main", "--task", "antonyms", "--shots", "500"], "500 shots"),
        (["main", "--task", "antonyms", "--seeds", "0"], "seeds must be a positive integer"),
        (["main", "--task", "antonyms", "--queries", "0"], "queries must be a positive integer"),
        (["order", "--task", "antonyms", "--shots", "1"], "shots >= 2"),
        (["methods", "--task", "antonyms", "--shots", "0"], "shots >= 1"),
        (["main", "--task", "synonyms"], "synonyms"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_opened(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was opened"))
    result = CliRunner().invoke(app, ["experiment", *arguments])
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_task_without_held_out_questions(seeing, tmp_path):
    with pytest.raises(ValueError, match="0 held out"):
        ran("main", seeing(), [picture_task(n_test=0)], tmp_path)
