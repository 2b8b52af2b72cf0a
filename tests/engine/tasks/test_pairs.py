"""Pairs as shipped and as read, their split, and the prompts made of them."""

import json

import pytest

import engine
from engine.tasks import SHIPPED, Pair, Task


@pytest.fixture(params=SHIPPED)
def task(request):
    return engine.tasks.load(request.param)


def test_shipped_data(task):
    """Enough pairs to split; none with the same input, so that no answer of a test pair is seen in training."""
    assert len(task.pairs) >= 80
    assert len({pair.input for pair in task.pairs}) == len(task.pairs)
    for pair in task.pairs:
        assert pair.input != pair.output
        assert all(word.isascii() and word == word.strip() for word in pair)
        if task.name != "capitals":  # names of one word or more
            assert all(word.isalpha() and word.islower() for word in pair)


def test_no_antonym_is_in_two_pairs():
    words = [word for pair in engine.tasks.load("antonyms").pairs for word in pair]
    assert len(set(words)) == len(words)


def test_split(task):
    """Disjoint and complete; the same for a seed, another for another."""
    split = task.split(seed=3)
    assert sorted([*split.train, *split.validation, *split.test]) == sorted(task.pairs)
    assert not set(split.train) & set(split.validation)
    assert not set(split.train) & set(split.test)
    assert not set(split.validation) & set(split.test)
    n = len(task.pairs)
    assert [len(part) for part in split] == pytest.approx([0.5 * n, 0.2 * n, 0.3 * n], abs=1)
    assert task.split(seed=3) == split
    assert task.split(seed=4) != split
    assert task.split() == task.split(seed=0)


def test_prompt():
    task = Task("toy", ())
    shots = [Pair("hot", "cold"), Pair("up", "down")]
    assert task.prompt([], "big") == "Q: big\nA:"
    assert task.prompt(shots, "big") == "Q: hot\nA: cold\n\nQ: up\nA: down\n\nQ: big\nA:"
    assert task.example(Pair("big", "small")) == ("Q: big\nA:", " small")
    assert task.example(Pair("big", "small"), shots[:1]) == ("Q: hot\nA: cold\n\nQ: big\nA:", " small")


@pytest.mark.parametrize("shots", [0, 1, 9])
def test_few_shot(task, shots):
    """No query is among its own demonstrations, and no demonstration comes twice."""
    examples = task.few_shot(task.pairs[:10], shots, count=50, seed=1)
    assert len(examples) == 50
    for prompt, answer in examples:
        *shown, (query, _) = [tuple(part.removeprefix("Q: ").split("\nA:")) for part in prompt.split("\n\n")]
        assert len(shown) == len(set(shown)) == shots
        assert query not in [asked for asked, _ in shown]
        assert Pair(query, answer.strip()) in task.pairs[:10]
        assert all(Pair(asked, told.strip()) in task.pairs[:10] for asked, told in shown)
    assert task.few_shot(task.pairs[:10], shots, count=50, seed=1) == examples
    assert task.few_shot(task.pairs[:10], shots, count=50, seed=2) != examples


def test_queries(task):
    """Every pair is asked once, in order; a pair that could demonstrate itself does not."""
    pairs = task.pairs[:12]
    examples = task.queries(pairs, pairs, shots=11)
    assert [example.answer for example in examples] == [f" {pair.output}" for pair in pairs]
    for pair, example in zip(pairs, examples, strict=True):
        assert example.prompt.endswith(f"Q: {pair.input}\nA:")
        assert example.prompt.count(f"Q: {pair.input}\n") == 1
        assert example.prompt.count("Q: ") == 12
    assert task.queries(pairs, (), shots=0)[0].prompt == f"Q: {pairs[0].input}\nA:"


def test_a_task_of_ones_own(tmp_path):
    """Any strings, blank lines skipped, in the file's order."""
    pairs = [Pair(f"in {i}", "žluťoučký\u2028kůň " + "x" * i) for i in range(12)]
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({"input": x, "output": y}, ensure_ascii=False) for x, y in pairs]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    for given in (path, str(path)):
        assert engine.tasks.load(given) == Task("mine", tuple(pairs))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_that_begins_with_a_byte_order_mark(tmp_path, end):
    lines = [json.dumps({"input": f"ž {i}", "output": "out"}, ensure_ascii=False) for i in range(12)]
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    assert engine.tasks.load(tmp_path / "mine.jsonl").pairs == tuple(Pair(f"ž {i}", "out") for i in range(12))


def test_lines_that_repeat_a_pair_are_left_out(tmp_path):
    lines = [json.dumps({"input": f"in {i}", "output": "out"}) for i in range(12)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([*lines, "", lines[3], lines[3]]))
    with pytest.warns(UserWarning, match=r"mine.jsonl: lines left out because they repeat a pair: \[14, 15\]"):
        found = engine.tasks.load(path)
    assert found.pairs == tuple(Pair(f"in {i}", "out") for i in range(12))


def test_several_pairs_of_one_input():
    """They lie in one part of the split, and none demonstrates another."""
    pairs = tuple(Pair(f"in {i % 10}", f"out {i}") for i in range(30))
    task = Task("toy", pairs)
    for seed in range(5):
        split = task.split(seed)
        assert sorted(pair for part in split for pair in part) == sorted(pairs)
        assert [len({pair.input for pair in part}) for part in split] == [5, 2, 3]
        assert [len(part) for part in split] == [15, 6, 9]
        asked = [*task.few_shot(pairs, shots=6, count=30, seed=seed), *task.queries(pairs, pairs, shots=6, seed=seed)]
        for prompt, _ in asked:
            *shown, query = prompt.removesuffix("A:").split("\n\n")
            assert len(shown) == 6
            assert not any(shot.startswith(query) for shot in shown)
