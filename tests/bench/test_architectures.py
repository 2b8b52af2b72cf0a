"""Architectures are built small: they run on token ids, are finite and the same again, and read what comes before."""

import pytest
import torch

from bench import architectures

# Grouped attention, experts and latent keys, a hybrid, state space, BERT as a decoder, and one that sees.
SAMPLE = ["qwen3", "deepseek_v3", "jamba", "mamba2", "bert", "llava"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("name", SAMPLE)
def test_models_run_and_depend_on_earlier_tokens(name):
    model = architectures.build(name)
    ids = torch.arange(1, 31)[None]
    changed = ids.clone()
    changed[0, 3] = 50
    with torch.no_grad():
        logits, again, other = (model(input_ids=given).logits for given in (ids, ids, changed))
    assert not model.training
    assert logits.shape == (1, 30, architectures.VOCABULARY)
    assert logits.isfinite().all()
    assert 0.1 < logits.abs().max() < 1e3
    assert torch.equal(logits, again)
    assert (logits - other)[0, -1].abs().max() > 1e-4
    torch.testing.assert_close(logits[:, :3], other[:, :3])  # nothing of what comes later


def test_builds_are_the_same_and_leave_the_random_state():
    before = torch.get_rng_state()
    first, second = (architectures.build("qwen3").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_names_of_both_mappings():
    names = architectures.names()
    assert names == sorted(set(names))
    assert {"gpt2", "qwen2_vl"} <= set(names)
    assert len(names) > 200


def test_an_unknown_name_is_told():
    with pytest.raises(ValueError, match="no architecture 'parrot'"):
        architectures.build("parrot")


def test_why_not_holds():
    """What is listed as not running on text does not."""
    with pytest.raises(TypeError, match="pixel_values"):
        architectures.build("blip")(input_ids=torch.arange(1, 31)[None])
