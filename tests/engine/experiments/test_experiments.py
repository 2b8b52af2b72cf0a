"""Every experiment from questions to page, on tiny random models that see; runs that go on; scores against naive."""

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import engine
import models
from bench.families import wrapped
from engine import naive
from engine.cli import app
from engine.experiments import EXPERIMENTS, Options, Results, default_shots, paper, report, run, running
from engine.experiments.setting import Setting, Way
from engine.methods import mtv
from engine.tasks import Pair, Task
from engine.tasks.pictures import PictureTask, Question
from models import zoo
from models.calls import Passing

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


@pytest.fixture(scope="module")
def seeing():
    """A function of the family: a tiny image-text model, made once."""
    made = {}

    def make(family="llava"):
        if family not in made:
            made[family] = wrapped(family)
            without_image_answers(made[family].hf)
        return made[family]

    return make


@pytest.fixture
def setting(seeing, tmp_path):
    return Setting(seeing(), picture_task(), 0, SMALL, tmp_path, progress=False)


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mains"], "no experiment 'mains'"),
        (["transfer", "--task", "antonyms"], "needs 2 or more tasks"),
        (["main", "--task", "antonyms", "--task", "antonyms"], "each once"),
        (["vizwiz"], "expected --data FOLDER"),
        (["flowers", "--data", "missing", "--task", "antonyms"], "no --task"),
        (["main", "--task", "antonyms", "--shots", "500"], "500 shots"),
        (["main", "--task", "antonyms", "--seeds", "0"], "seeds >= 1"),
        (["main", "--task", "antonyms", "--queries", "0"], "queries >= 1"),
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
