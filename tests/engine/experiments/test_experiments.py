"""Every experiment from questions to page, on tiny random models that see; runs that go on; scores against naive."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine
from engine import naive
from engine.experiments import EXPERIMENTS, Results, default_shots, paper, report, running
from engine.experiments.setting import Way
from engine.methods import mtv
from engine.tasks import Pair, Task
from engine.tasks.pictures import Question
from models.calls import Passing
from tests.experiments import SMALL, Page, picture, picture_task, ran, two_way_task, ways

WAYS = {
    "baselines": {"zero-shot + VTV", "zero-shot + FV", "zero-shot + MTV", "zero-shot + random heads", "2-shot ICL"},
    "one_shot": {"1-shot", "1-shot + MTV", "1-shot + random heads", "4-shot ICL", "zero-shot",
                 "zero-shot + MTV of one 4-shot prompt", "zero-shot + random heads, one 4-shot prompt"},
    "order": {"zero-shot", "2-shot ICL", "zero-shot + MTV", "zero-shot + random heads"},
    "scaling": {"zero-shot", "2-shot ICL", "zero-shot + MTV of 1", "zero-shot + MTV of 4",
                "zero-shot + random heads, means of 4"},
    "cost": {"zero-shot", "2-shot ICL", "zero-shot + MTV"},
    "methods": {"zero-shot", "2-shot ICL", "zero-shot + MTV", "zero-shot + MTV, straight-through", "zero-shot + STV",
                "zero-shot + VTV", "zero-shot + FV", "zero-shot + learned", "zero-shot + linear", "SAV",
                "zero-shot + random heads"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*several tokens")
@pytest.mark.parametrize("name", WAYS)
def test_every_experiment(seeing, tmp_path, name):
    results = ran(name, seeing(), [picture_task()], tmp_path)
    assert WAYS[name] <= set(ways(results))
    assert {"results.json", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert {row["way"] for row in results.rows()} == set(ways(results))
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 200
    if name == "cost":
        assert all(record["milliseconds"] > 0 for record in results.records)
        zero_shot, few_shot, patched = (record["memory_mib"] for record in results.records)
        assert zero_shot < patched < few_shot


def test_all_names_are_tested():
    assert set(EXPERIMENTS) == {"main", "transfer", *WAYS, "vizwiz", "okvqa", "flowers", "cub"}


@pytest.mark.filterwarnings("ignore:.*several tokens")
@pytest.mark.parametrize("name", ["main", "one_shot", "baselines"])
def test_text_tasks(model, tmp_path, name):
    pairs = tuple(Pair(chr(97 + i), chr(98 + i)) for i in range(16))
    results = ran(name, model, [Task("next", pairs)], tmp_path)
    assert all(record["within"] is None for record in results.records)
    assert "among the labels" not in results.rows()[0]


@pytest.mark.parametrize("name", ["main", "one_shot", "scaling"])
def test_pairs_are_the_one_shot_of_two_way_tasks(seeing, tmp_path, name):
    results = ran(name, seeing(), [two_way_task()], tmp_path, replace(SMALL, shots=0))
    assert not [way for way in ways(results) if "zero-shot" in way]
    assert "1-shot" in ways(results)


def test_a_label_said_again_and_again_is_an_answer(setting, monkeypatch):
    texts = iter([" red red red", "reddish", " blue\n", ""])
    monkeypatch.setattr("engine.experiments.setting.generate", lambda _, prompts, **__: [next(texts) for _ in prompts])
    only = replace(setting, options=replace(SMALL, shots=0, queries=2))
    assert running._samples(only) == [
        {"zero-shot": "red", "zero-shot + MTV": "blue"}, {"zero-shot": "reddish", "zero-shot + MTV": ""},
    ]  # fmt: skip


def test_shots_are_those_of_the_paper():
    one, pairs = picture_task(), two_way_task()
    found = [default_shots(*case) for case in (("vizwiz", [one]), ("cub", [pairs]), ("main", [pairs, one]))]
    assert found == [4, 0, 8]


def test_transfer_is_over_ordered_pairs(seeing, tmp_path):
    tasks = [picture_task(name) for name in ("hue", "tone", "dye")]
    results = ran("transfer", seeing(), tasks, tmp_path)
    heads = {
        task.name: len(engine.TaskVector.load(tmp_path / "vectors" / f"{task.name}-0-mtv.safetensors").heads)
        for task in tasks
    }
    carried = {(record["task"], record["way"]): record["heads"] for record in results.records}
    for task in tasks:
        assert carried[task.name, "zero-shot + own heads"] == heads[task.name]
        for other in tasks:
            if other is not task:
                assert carried[task.name, f"zero-shot + heads of {other.name}"] == heads[other.name]
    part = tmp_path / "parts" / "transfer-hue-0.json"
    before = json.loads(part.read_text())["setting"]
    ran("transfer", seeing(), [tasks[0], picture_task("tone", n_test=6)], tmp_path)
    assert json.loads(part.read_text())["setting"] != before  # what it is compared with is another


def test_orders_are_of_the_same_demonstrations(setting):
    """Every prompt keeps its pictures and its query; some come in another order."""
    setting = replace(setting, options=replace(SMALL, shots=4))
    prompts = [[example.prompt for example in paper.permuted(setting, setting.held_out, order)] for order in range(5)]
    for some in zip(*prompts, strict=True):
        ids = [[id(image) for image in prompt.images] for prompt in some]
        assert len({tuple(sorted(one)) for one in ids}) == 1
        assert len({one[-1] for one in ids}) == 1
        assert len({tuple(one) for one in ids}) > 1


def test_scores_are_those_of_naive(setting, draw):
    """Accuracy and accuracy among the labels, of all ways in one pass, against one hooked forward each."""
    model = setting.model
    masks, values = draw(model, rows=2)
    _, others = draw(model)
    asked = [Way("a"), Way("b", masks[0], values), Way("c", masks[1], others)]
    # Answers that the model gives: every second question's is what it says in way b.
    said = [naive.patch(model, e.prompt, heads=masks[:1], values=values).argmax() for e in setting.queries(0)]
    test = tuple(
        replace(q, answer=model.decode(s[None])) if i % 2 else q
        for i, (q, s) in enumerate(zip(setting.held_out, said, strict=True))
    )
    labels = (*dict.fromkeys(q.answer for q in test), "x", "y", "z")
    setting = replace(setting, task=replace(setting.task, test=test, labels=labels))
    examples = setting.queries(0)
    found = setting.ask(examples, asked)
    ids = [engine.tasks.first_token(model, engine.Example(examples[0].prompt, label)) for label in labels]
    for record, way in zip(found, asked, strict=True):
        hits, among = [], []
        for example in examples:
            logits = naive.patch(model, example.prompt, heads=None if way.mask is None else way.mask[None],
                                 values=way.values)[0]  # fmt: skip
            target = engine.tasks.first_token(model, example)
            hits.append(int(logits.argmax()) == target)
            among.append(ids[int(logits[ids].argmax())] == target)
        assert record["accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert record["within"] == pytest.approx(sum(among) / len(among))
    assert found[1]["accuracy"] >= 0.5  # by construction, so zeros do not agree by accident


def test_random_heads_are_as_many_and_carry_the_values(setting):
    vector = setting.vector()
    drawn = setting.random_heads(vector, "random")
    assert {int(way.mask.sum()) for way in drawn} == {len(vector.heads)}
    assert len({way.mask.numpy().tobytes() for way in drawn}) > 1
    assert all(way.values is vector.values for way in drawn)


def test_kept_bytes_are_a_prefix_es(setting):
    example = setting.queries(0)[0]
    prefix = engine.prefill(setting.model, example.prompt)
    want = prefix.nbytes / len(prefix.cache) * len(prefix.tokens)
    assert paper._kept_bytes(setting, len(prefix.tokens), Way("plain")) == pytest.approx(want)


def test_a_step_runs_the_vision_tower_once(seeing):
    """32 rollouts of a prompt with three pictures; in the next step on it, not at all."""
    model, query = seeing(), two_way_task().test[0]
    example = two_way_task().example(query)
    means = torch.zeros(model.shape.n_layers, model.shape.n_heads, model.shape.head_dim)
    calls, by_step = [], []
    tower = next(module for name, module in model.hf.named_modules() if name.endswith("vision_tower"))
    engine.patch(model, example.prompt)  # met for the first time, a model is checked
    handle = tower.register_forward_pre_hook(Passing(lambda *_: calls.append(1)))
    try:
        mtv.extract(model, [example], means, steps=2, rollouts=32, on_step=lambda step: by_step.append(len(calls)))
    finally:
        handle.remove()
    assert by_step == [1, 1]


def test_cells():
    records = [
        dict(task="t", seed=seed, way="a", accuracy=accuracy, within=None, tokens=3.0, queries=10)
        for seed, accuracy in enumerate((0.2, 0.4))
    ]
    several = Results("main", "m", SMALL, records, Path()).rows()
    assert several == [{"task": "t", "way": "a", "accuracy": "0.30 ± 0.14", "tokens a query": "3.0"}]
    one = Results("main", "m", SMALL, records[:1], Path()).rows()
    assert one[0]["accuracy"] == "0.20 (0.06-0.51)"  # 2 of 10, Wilson


def test_the_page_is_escaped():
    asked = Question("<image> is <b>x</b> & y?", (picture(0),), " yes", ("yes", "yeah"), ("p",))
    rows = [{"task": "<i>", "way": "a", "accuracy": "0.1"}]
    answers = {"zero-shot": "<script>no</script>", "MTV": "yeah"}
    text = report.page("main", "m<1>", dict(seeds=1), rows, {"t&t": [(asked, answers)]}, {})
    page = Page(text)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert "is <b>x</b> & y?" in page.text
    assert "<script>no</script>" in page.text
    assert Counter(page.text)["✓"] == 1
