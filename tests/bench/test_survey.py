"""The survey builds what it names, sees what is wrong, and says so. All architectures: `bench families --all`."""

import pytest
import torch

from bench import architectures, survey

SAMPLE = ["smollm3", "gpt_oss", "deepseek_v3", "lfm2", "qwen3_next", "gemma4_text", "mpt", "blip", "mamba"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_sample():
    found = {name: survey.look(name) for name in SAMPLE}
    assert all(one.right for one in found.values()), found
    ways = {name: one.way for name, one in found.items()}
    assert ways == {
        "smollm3": "packed", "gpt_oss": "packed", "deepseek_v3": "packed", "gemma4_text": "packed",
        "lfm2": "batch", "qwen3_next": "batch", "mpt": "expanded", "blip": "not built", "mamba": "refused",
    }  # fmt: skip
    page = survey.markdown(list(found.values()))
    assert all(f"| {name} | {way} |" in page for name, way in ways.items())
    assert "Wrong, or ended by an error that is not ours: none." in page


def test_what_is_wrong_is_seen(monkeypatch):
    """Rows of the engine that are off by a thousandth."""
    patch = survey.engine.patch
    monkeypatch.setattr(survey.engine, "patch", lambda *given, **options: 1.001 * patch(*given, **options))
    found = survey.look("llama")
    assert not found.right
    assert "llama" in survey.tally([found]).rsplit(":", 1)[1]


@pytest.mark.parametrize("name", ["llama", "jamba"])
def test_models_are_small_random_and_the_same(name):
    first, second = architectures.build(name), architectures.build(name)
    ids = torch.arange(1, 31)[None]
    with torch.no_grad():
        logits = first(input_ids=ids).logits
        assert torch.equal(logits, second(input_ids=ids).logits)
        ids[0, 24] = 50
        assert not torch.equal(logits[:, -1], first(input_ids=ids).logits[:, -1])
    assert logits.isfinite().all()
    assert sum(parameter.numel() for parameter in first.parameters()) < 1e6


def test_no_such_architecture():
    with pytest.raises(ValueError, match="no architecture 'gpt-7'"):
        architectures.build("gpt-7")
