"""Ranks that torchrun starts end with the bits of one process; one that dies, fails or hangs is named.

Run as a module, this file is what the ranks do: `torchrun -m tests.engine.test_distributed JOB FOLDER`.
"""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import engine
import models
from engine import Example, distributed
from engine.artifacts import load_tensors
from engine.cli import app, plain_errors
from engine.core import activations
from engine.distributed import ALONE, LostRankError, World
from engine.methods import mtv
from models import zoo

ROOT = Path(__file__).parents[2]
WORDS = ["hot", "cold", "big", "small", "up", "down", "old", "new", "in", "out", "on", "off", "day", "night"]
EXAMPLES = [Example(f"Q: {word}\nA:", f" {word[::-1]}") for word in WORDS]
PROMPTS = [f"Q: {a}\nA: {b}\n\nQ: {b}\nA:" for a, b in pairwise(WORDS)]
VALIDATION = [Example(f"Is {a} {b}?", " no") for a in WORDS[:5] for b in WORDS[5:9]]  # more than share one forward
MEANS = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


def tiny(family="llama"):
    return models.wrap(zoo.tiny(family), zoo.tiny_tokenizer(), name=f"tiny-{family}")


def torchrun(*arguments, ranks=2):
    """`torchrun` with some ranks of a thread each, from the root of the project."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def plain(vector):
    """What must agree, bit by bit."""
    keys = ("losses", "validation_loss", "at_once", "steps")
    return [vector.mask, vector.probabilities, vector.values, *(vector.metadata[key] for key in keys)]


def equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# What the ranks do.


def everything(world, folder, at_once=None):
    """Means, searches and a score; in a world of its own, or shared out."""
    model, unpacked = tiny(), tiny("mistral")
    ruled = unpacked._ruled_of
    unpacked._ruled_of = lambda body: ruled(body).without("packed", "the tests say so")
    activations.MAX_TOKENS = 80  # several forwards
    done = {}
    for each in (model, unpacked):
        done[f"means {each.name}"] = [engine.mean_activations(each, PROMPTS, progress=False, world=world)]
    options = dict(progress=False, world=world)
    for preset, rollouts in (("paper", 7), ("reference", 8)):
        # What a rank runs together, by default; one process must be told.
        options["at_once"] = at_once and -(-rollouts // at_once)
        vector = engine.mtv.extract(model, EXAMPLES, MEANS, preset=preset, rollouts=rollouts, steps=6, **options)
        done[preset] = plain(vector)
    options["rollouts"] = 8
    done["unpacked"] = plain(engine.mtv.extract(unpacked, EXAMPLES, MEANS, steps=3, **options))
    # Only the first rank has the checkpoint, a search by one process stopped half way.
    path = Path(folder) / f"rank{world.rank}" / "search.ckpt"
    checked = dict(validation=VALIDATION, checkpoint=path, checkpoint_every=5)
    done["resumed"] = plain(engine.mtv.extract(model, EXAMPLES, MEANS, steps=12, **options, **checked))
    score = engine.evaluate(model, "zero-shot", EXAMPLES, heads=[(1, 2)], values=MEANS, world=world, by="first_token")
    done["score"] = [score.scores, score.low, score.high]
    return done


def job_everything(folder):
    with distributed.joined() as world:
        torch.save(everything(world, folder), Path(folder) / f"{world.rank}.pt")


def refusals(world, folder):
    """What each rank hears when ranks were given different things, or one of them meets something bad."""
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.hf.lm_head.weight[0] += world.rank
    sequential = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name=f"model-{world.rank}")
    few = dict(steps=3, rollouts=4, progress=False, world=world)
    (Path(folder) / "file").write_text("")
    half = dict(rollouts=8, steps=12, validation=VALIDATION, checkpoint=Path(folder) / "half.ckpt")

    def search(model=model, examples=EXAMPLES, means=MEANS, **options):
        engine.mtv.extract(model, examples, means, **few | options)

    def not_finite():
        """Rank 1's part only."""
        broken = tiny()
        if world.rank == 1:
            broken.hf.lm_head.register_forward_hook(lambda _, __, out: out * float("nan"))
        search(broken)

    def drifted():
        update = mtv.Search.update

        def elsewhere(self, masks, losses):
            update(self, masks, losses)
            with torch.no_grad():
                self.theta += world.rank

        mtv.Search.update = elsewhere
        try:
            search()
        finally:
            mtv.Search.update = update

    attempts = {
        "name is": lambda: search(sequential),
        "weights": lambda: search(other),
        "seed": lambda: search(seed=world.rank, validation=VALIDATION),
        "means": lambda: search(means=MEANS + world.rank),
        "data": lambda: search(examples=EXAMPLES[world.rank :]),
        "validation": lambda: search(validation=VALIDATION[world.rank :]),
        "steps": lambda: search(steps=3 + world.rank),
        "prompts": lambda: engine.mean_activations(model, PROMPTS[world.rank :], progress=False, world=world),
        "one prompt more": lambda: engine.mean_activations(
            model, PROMPTS[: 8 + world.rank], progress=False, world=world
        ),
        "lengths": lambda: engine.evaluate(model, "all", EXAMPLES[world.rank :], world=world),
        "patch": lambda: engine.evaluate(model, "all", EXAMPLES, heads=[(world.rank, 0)], values=MEANS, world=world),
        "not finite": not_finite,
        "drifted": drifted,
        "of one process": lambda: search(**half),
        "of one process, cut": lambda: search(**half, at_once=4),
        "not a checkpoint": lambda: search(checkpoint=Path(__file__)),
        "not a folder": lambda: search(checkpoint=Path(folder) / "file" / "search.ckpt"),
    }
    search()
    heard = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            heard[name] = None
        except Exception as error:
            heard[name] = [type(error).__name__, str(error)]
    search()  # all are still there, and at the same place
    return heard


def job_refusals(folder):
    with distributed.joined() as world:
        (Path(folder) / f"{world.rank}.json").write_text(json.dumps(refusals(world, folder)))


def job_lost(folder, how):
    """Rank 1 is lost after step 7; the others write down what they hear."""

    def on_step(step):
        if step.step == 7 and world.rank == 1:
            if how == "failed":
                raise MemoryError("not enough of it")
            if how != "late":
                os._exit(9)
            time.sleep(60)
        if step.step == 7 and how == "computing":
            time.sleep(60)

    options = dict(steps=20, rollouts=8, checkpoint=Path(folder) / f"{os.environ['RANK']}.ckpt", checkpoint_every=3)
    try:
        with distributed.joined(timeout=6 if how == "late" else 60) as world:
            engine.mtv.extract(tiny(), EXAMPLES, MEANS, on_step=on_step, world=world, **options)
    except LostRankError as error:
        (Path(folder) / f"{os.environ['RANK']}.txt").write_text(str(error))
        raise


# What is asked of them.


class StoppedError(Exception):
    pass


def half_a_search(checkpoint, at_once):
    """By one process, in the pieces that so many ranks would run."""

    def stop(step):
        if step.step == 6:
            raise StoppedError

    with pytest.raises(StoppedError):
        engine.mtv.extract(
            tiny(), EXAMPLES, MEANS, steps=12, rollouts=8, validation=VALIDATION, at_once=at_once,
            checkpoint=checkpoint, checkpoint_every=5, on_step=stop,
        )  # fmt: skip


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_same_bits(tmp_path, monkeypatch, ranks):
    """Theta, heads, losses, means and hits, on every rank, are those of one process. Three ranks: uneven parts."""
    monkeypatch.setattr(activations, "MAX_TOKENS", activations.MAX_TOKENS)
    for folder in ("ranks", "alone"):
        half_a_search(tmp_path / folder / "rank0" / "search.ckpt", -(-8 // ranks))
    alone = everything(ALONE, tmp_path / "alone", at_once=ranks)
    found = torchrun("tests.engine.test_distributed", "everything", tmp_path / "ranks", ranks=ranks)
    assert found.returncode == 0, found.stderr
    for rank in range(ranks):
        done = torch.load(tmp_path / "ranks" / f"{rank}.pt")
        assert done.keys() == alone.keys()
        for name in alone:
            equal(done[name], alone[name])
    folders = [path for path in (tmp_path / "ranks").iterdir() if path.is_dir()]
    assert [path.name for path in folders] == ["rank0"], "only the first rank writes"
    assert found.stdout == ""


def test_refused_by_all(tmp_path):
    """Every rank raises the same error, says what differs, and can go on."""
    half_a_search(tmp_path / "half.ckpt", at_once=8)
    found = torchrun("tests.engine.test_distributed", "refusals", tmp_path)
    assert found.returncode == 0, found.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    differ = "the ranks must be given the same: "
    expected = {
        "name is": ["ValueError", f"{differ}model is 'model-0' on rank 0 and 'model-1' on rank 1 of 2"],
        "seed": ["ValueError", f"{differ}seed is 0 on rank 0 and 1 on rank 1 of 2"],
        "steps": ["ValueError", f"{differ}steps is 3 on rank 0 and 4 on rank 1 of 2"],
    }
    assert {name: first[name] for name in expected} == expected
    for name in ("weights", "data", "validation", "prompts", "lengths", "patch"):
        kind, said = first[name]
        assert (kind, said[: len(differ) + len(name)]) == ("ValueError", differ + name)
    assert first["means"][1].startswith(differ)
    assert first["one prompt more"][1].startswith(f"{differ}prompts is ")
    assert first["not finite"][0] == "ValueError"
    assert "step 0: the loss of example" in first["not finite"][1]
    assert first["drifted"] == [
        "RuntimeError",
        "the ranks drew different rollouts: their processors compute a different theta",
    ]
    assert first["of one process"][0] == "ValueError"
    assert "made with 8 rollouts at once" in first["of one process"][1]
    assert "give at_once=4" in first["of one process"][1]
    assert first["of one process, cut"] is None
    assert first["not a checkpoint"][0] == "ValueError"
    assert "truncated" in first["not a checkpoint"][1]
    assert first["not a folder"][0] in ("NotADirectoryError", "FileExistsError")


@pytest.mark.parametrize(
    ("how", "ranks", "said"),
    [
        ("dead", 3, "rank 1 of 3 is gone"),
        pytest.param("computing", 2, "rank 1 of 2 is gone", marks=pytest.mark.slow),
        pytest.param("failed", 2, "rank 1 of 2 failed (MemoryError: not enough of it)", marks=pytest.mark.slow),
        ("late", 2, "rank 1 of 2 gave no answer in time"),
    ],
)
def test_a_rank_is_lost(tmp_path, how, ranks, said):
    """The others end at once and say which, when, and what is kept; one process goes on from there to the same end."""
    found = torchrun("tests.engine.test_distributed", "lost", tmp_path, how, ranks=ranks)
    assert found.returncode != 0
    for rank in {*range(ranks)} - {1}:
        heard = (tmp_path / f"{rank}.txt").read_text()
        path = tmp_path / f"{rank}.ckpt"
        assert heard == f"{said}; of 7 steps made 6 are in {path}: the same call goes on from there"
        assert heard in found.stderr
    assert not (tmp_path / "1.txt").exists() or how == "late"
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["0.ckpt"]
    assert len(load_tensors(tmp_path / "0.ckpt", ("losses",))[0]["losses"]) == 6

    options = dict(steps=20, rollouts=8, progress=False)
    resumed = engine.mtv.extract(tiny(), EXAMPLES, MEANS, checkpoint=tmp_path / "0.ckpt", **options)
    whole = engine.mtv.extract(tiny(), EXAMPLES, MEANS, at_once=-(-8 // ranks), **options)
    equal(plain(resumed), plain(whole))


def test_command_line(tmp_path):
    """The first rank alone prints and writes, and the file is that of one process."""
    zoo.tiny("llama").save_pretrained(tmp_path / "model")
    zoo.tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"input": word, "output": word[::-1]}) for word in WORDS]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    options = dict(model=tmp_path / "model", task=tmp_path / "mine.jsonl", steps=3, shots=2, prompts=5, rollouts=6)
    options |= {"icl-shots": 2}

    def extract(out, *more):
        given = options | {"out": tmp_path / out}
        return ["engine", "extract", *(str(x) for key, value in given.items() for x in (f"--{key}", value)), *more]

    both = torchrun(*extract("both"))
    assert both.returncode == 0, both.stderr
    one = CliRunner().invoke(app, extract("one", "--at-once", "3")[1:])
    assert one.exit_code == 0, one.output
    written = sorted(path.name for path in (tmp_path / "both").iterdir())
    assert written == ["curve.png", "heads.png", "results.json", "vector.safetensors"]
    vectors = [(tmp_path / out / "vector.safetensors").read_bytes() for out in ("both", "one")]
    assert vectors[0] == vectors[1]
    assert both.stdout.count("zero-shot + MTV") == one.output.count("zero-shot + MTV") == 1
    assert both.stderr.count("means of 5 2-shot prompts") == 1


# What one process can see.


@pytest.mark.parametrize(("n", "whole"), [(32, 1), (32, 11), (7, 3), (2, 16), (50, 16), (1, 1), (0, 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares(n, whole, size):
    """Side by side they are everything, cut at multiples of `whole`; no rank has two pieces more than another."""
    shares = [World(rank, size).share(n, whole) for rank in range(size)]
    assert [i for share in shares for i in range(n)[share]] == list(range(n))
    assert all(share.start % whole == 0 or share.start == n for share in shares)
    pieces = [-(-(share.stop - share.start) // whole) for share in shares]
    assert max(pieces) - min(pieces) <= 1


def test_more_ranks_than_rollouts(model):
    """Refused before anything runs: here, nobody would answer."""
    with pytest.raises(ValueError, match=r"at least one rollout for each of 5 ranks, got rollouts=4"):
        engine.mtv.extract(model, EXAMPLES, MEANS, rollouts=4, world=World(0, 5))


@pytest.mark.parametrize(("at_once", "size"), [(0, 1), (9, 1), (5, 2)])
def test_too_many_at_once(model, at_once, size):
    with pytest.raises(ValueError, match=rf"at_once from 1 to {8 // size}, .* got at_once={at_once}"):
        engine.mtv.extract(model, EXAMPLES, MEANS, rollouts=8, at_once=at_once, world=World(0, size))


def test_pieces_are_the_same_search(model):
    """Rollouts run in pieces, one by one too, give the losses of all together, up to rounding."""
    options = dict(steps=1, rollouts=7, progress=False)
    together = engine.mtv.extract(model, EXAMPLES, MEANS, **options).metadata["losses"]
    for at_once in (1, 3, 6):
        found = engine.mtv.extract(model, EXAMPLES, MEANS, at_once=at_once, **options).metadata["losses"]
        assert found == pytest.approx(together, abs=1e-5)


def test_alone_without_torchrun(monkeypatch):
    """No process group is made, nothing is exchanged."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined() as world:
        assert not torch.distributed.is_initialized()
        assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
        assert torch.equal(world.gather(MEANS, 3), MEANS)
        with pytest.raises(OSError, match="here"):
            world.from_first(lambda: (_ for _ in ()).throw(OSError("here")))


@pytest.mark.parametrize("device", ["cuda:1", "gpu"])
def test_devices_of_several_ranks(monkeypatch, device):
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"'cpu' or 'cuda' where several ranks run, got '{device}'"), (
        distributed.joined(device)
    ):  # fmt: skip
        pass


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="no cuda:1: this machine has 1 GPUs"), distributed.joined("cuda"):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="no cuda:2: this machine has 1 GPUs"), distributed.joined("cuda:2"):
        pass
    with pytest.raises(ValueError, match="that torch knows, got 'gpu'"), distributed.joined("gpu"):
        pass


def test_errors_name_the_rank(monkeypatch, capsys):
    """Where several processes write to one screen."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(typer.Exit), plain_errors():
        raise LostRankError("rank 0 of 2 is gone")
    assert capsys.readouterr().err == "rank 1: error: rank 0 of 2 is gone\n"


def test_digest():
    """Equal for equal bits and shapes, and for nothing else."""
    ones = torch.ones(4)
    assert distributed.digest(ones, "a", [1]) == distributed.digest(ones.clone(), "a", [1])
    others = [ones.view(2, 2), ones.double(), ones.bfloat16(), ones * (1 + 1e-7)]
    assert len({distributed.digest(one) for one in (ones, *others)}) == 5


def test_identity_of_a_model(model):
    """Any parameter changed by training shows."""
    same = tiny()
    assert distributed.identity(same) == distributed.identity(model)
    with torch.no_grad():
        same.hf.model.layers[1].mlp.up_proj.weight *= 1.001
    assert distributed.identity(same) != distributed.identity(model)


def test_weights_that_are_shared_out_themselves():
    """Tensor parallel: its ranks run one model together, and would wait for one another."""
    parallel = tiny()
    parallel.hf.lm_head.weight.full_tensor = lambda: None  # as a DTensor has
    with pytest.raises(ValueError, match="weights of tiny-llama are shared out over the ranks"):
        distributed.identity(parallel)


if __name__ == "__main__":
    globals()[f"job_{sys.argv[1]}"](*sys.argv[2:])
