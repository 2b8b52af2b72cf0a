"""Task vectors: what they hold, arithmetic, low rank, files."""

import pytest
import torch
from torch import nn

from engine import weights
from tests.engine.weights.networks import Tied, Vision, setting


@pytest.fixture
def given():
    base, tuned, _ = setting(Vision)
    return base, tuned, weights.task_vectors(base, *tuned, names=["a", "b", "c"])


def same(vectors, differences):
    for name in vectors.shapes:
        torch.testing.assert_close(vectors.whole(name), differences(name), atol=1e-14, rtol=0)


def test_differences(given):
    base, tuned, vectors = given
    same(vectors, lambda n: torch.stack([one.get_parameter(n) - base.get_parameter(n) for one in tuned]).detach())
    assert list(vectors.shapes) == [name for name, _ in base.named_parameters()] == vectors.blocks()
    assert (vectors.base, vectors.names, len(vectors)) == ("Vision", ("a", "b", "c"), 3)


def test_state_dicts_are_taken(given):
    base, tuned, vectors = given
    again = weights.task_vectors(base, *(one.state_dict() for one in tuned))
    same(again, vectors.whole)
    assert again.names == ("state dict 1", "state dict 2", "state dict 3")


def test_state_dicts_of_tied_models_may_have_one_name_or_both():
    base, tuned, _ = setting(Tied)
    whole = tuned[0].state_dict()
    assert {"table.weight", "out.weight"} <= whole.keys()
    for left_out in ("table.weight", "out.weight"):
        part = {key: x for key, x in whole.items() if key != left_out}
        same(weights.task_vectors(base, part), weights.task_vectors(base, tuned[0]).whole)


def test_arithmetic(given):
    _, _, vectors = given
    same(-vectors, lambda n: -vectors.whole(n))
    same(0.5 * vectors, lambda n: vectors.whole(n) / 2)
    same(vectors * 2 - vectors, vectors.whole)
    same(vectors["b"], lambda n: vectors.whole(n)[1:2])
    assert (-vectors["b"] + 2 * vectors["a"]).names == ("-b + 2 * a",)
    with pytest.raises(KeyError, match="'d'"):
        vectors["d"]


def test_low_rank(given):
    _, _, vectors = given
    low = vectors.low_rank(3)
    assert set(low.factors) == {"kinds.weight", "wide.weight", "narrow.weight", "head.weight", "more"}
    left_out = [sum((vectors.whole(n)[t] - low.whole(n)[t]).square().sum() for n in low.shapes) for t in range(3)]
    norm = [sum(vectors.whole(n)[t].square().sum() for n in low.shapes) for t in range(3)]
    assert low.error == pytest.approx([(a / b).sqrt().item() for a, b in zip(left_out, norm, strict=True)])
    assert f"{low.error[0]:.1%}" in repr(low)
    assert torch.linalg.matrix_rank(low.whole("wide.weight")).tolist() == [3, 3, 3]
    # It is the nearest: no other matrices of this rank are nearer than the singular values that are left out.
    s = torch.linalg.svdvals(vectors.whole("wide.weight"))[:, 3:]
    torch.testing.assert_close(
        (vectors.whole("wide.weight") - low.whole("wide.weight")).flatten(1).norm(dim=1), s.norm(dim=1)
    )


def test_arithmetic_of_low_rank(given):
    _, _, vectors = given
    low, other = vectors.low_rank(2), vectors.low_rank(3)
    same(low + other, lambda n: low.whole(n) + other.whole(n))
    same(low - vectors, lambda n: low.whole(n) - vectors.whole(n))
    same(-0.5 * low, lambda n: -low.whole(n) / 2)
    same(low["c"], lambda n: low.whole(n)[2:])
    assert low["c"].error == low.error[2:]
    assert (low + other).factors.keys() == other.factors.keys() & low.factors.keys()


def test_full_rank_leaves_nothing_out(given):
    _, _, vectors = given
    assert vectors.low_rank(12).factors == {}
    assert max(weights.task_vectors(nn.Linear(9, 9), nn.Linear(9, 9)).low_rank(8).error) < 0.2


def test_files(given, tmp_path):
    _, _, vectors = given
    for kept in (vectors, vectors.low_rank(2)):
        kept.save(tmp_path / "vectors.safetensors")
        again = weights.TaskVectors.load(tmp_path / "vectors.safetensors")
        same(again, kept.whole)
        assert again.factors.keys() == kept.factors.keys()
        assert (again.base, again.names, again.shapes, again.error) == (kept.base, kept.names, kept.shapes, kept.error)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.safetensors"]


def test_other_buffers_are_warned_of():
    base, tuned = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    tuned.running_mean += 1
    with pytest.warns(UserWarning, match="running_mean"):
        weights.task_vectors(base, tuned)


def test_differences_of_half_precision_are_taken_in_single():
    base, tuned = nn.Linear(4, 4).to(torch.float16), nn.Linear(4, 4)
    vectors = weights.task_vectors(base, tuned)
    want = (tuned.weight - base.weight.float()).half()
    assert torch.equal(vectors.whole("weight")[0], want)


def test_names_are_what_it_holds(given):
    _, _, vectors = given
    assert "b" in vectors
    assert "d" not in vectors
    assert 0 not in vectors
    assert list(vectors) == ["a", "b", "c"]
    assert {name: vectors[name].names for name in vectors} == {"a": ("a",), "b": ("b",), "c": ("c",)}


def test_what_a_sum_of_low_rank_leaves_out_is_not_known(given):
    _, _, vectors = given
    low = vectors.low_rank(2)
    assert min(low.error) > 0
    assert (low + low).error == (low - vectors).error == ()
    assert (0.5 * low).error == (-low).error == low.error
