"""Shapes are checked while the tests run (tests/typechecking.py); tiny random models of several families.

Tests of bad input (test_bad_input*.py) need the engine's own errors, which the checker would pre-empt: they run by
themselves, `CHECK_TYPES=0 pytest`, as `make test` does.
"""

import os
from contextlib import nullcontext

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side, a thread each, the processes that they start as well: two that share two cores by two threads
# each wait for each other at every product.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.typechecking import shapes_checked

torch.set_num_threads(1)

CHECKED = os.environ.get("CHECK_TYPES", "1") != "0"
collect_ignore_glob = ["*/test_bad_input*"] if CHECKED else ["test_*", "*/test_[!b]*", "*/test_b[!a]*"]

with shapes_checked() if CHECKED else nullcontext():
    import engine
    import models
    from models import zoo

FAMILIES = ("llama", "gpt2", "qwen3", "mistral")
PACKED = ("llama", "gpt2", "qwen3")
# Families, and a model whose rows are not packed, whatever the families allow.
KINDS = (*FAMILIES, "unpacked")


def quick(names, *kept):
    """Parameters, of which those that are not kept are marked slow: relatives of others that are tested."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in kept)) for name in names]


def pytest_collection_modifyitems(items):
    """The longest tests first: one of two processes would be idle if they were the last."""
    items.sort(key=lambda item: item.name.partition("[")[0] not in ("test_walkthrough", "test_tensor_parallel"))


def unpacked(model):
    """A model whose rows are not packed, whatever its own rules say."""
    ruled = model._ruled_of
    model._ruled_of = lambda body: ruled(body).without("packed", "the tests say so")
    return model


@pytest.fixture(scope="session")
def tiny():
    """A function of the family: a wrapped tiny random model with a tokenizer of one token a character, made once."""
    made = {}

    def make(family="llama"):
        if family not in made:
            hf = zoo.tiny("mistral" if family == "unpacked" else family)
            made[family] = models.wrap(hf, zoo.tiny_tokenizer(), name=f"tiny-{family}")
            if family == "unpacked":
                unpacked(made[family])
            # Met for the first time, a model is checked and its sites are found: here, so that no test counts those
            # forwards.
            for site in ("z", "resid_post"):
                made[family].site(site)
            for strategy in ("auto", "expanded", "layered") if family in PACKED else ("auto",):
                engine.patch(made[family], list(range(1, 97)), heads=None, values=None, strategy=strategy)
        return made[family]

    return make


@pytest.fixture(scope="session")
def model(tiny):
    return tiny("llama")


@pytest.fixture(scope="session")
def smollm2():
    """The real model the demo runs on."""
    return models.load("smollm2-135m")


@pytest.fixture(scope="session")
def small(smollm2):
    """For examples: SmolLM2's layers, heads and tokenizer, random weights of a sixteenth of its width."""
    config = LlamaConfig(
        hidden_size=36, intermediate_size=72, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=4, vocab_size=smollm2.shape.vocab_size, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.wrap(LlamaForCausalLM(config).eval(), smollm2.tokenizer, name="smollm2-small")


@pytest.fixture(scope="session")
def families():
    """A function of the family's name: a tiny model beside copies that the engine never sees, made once."""
    from tests.sites import Family

    made = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = Family(name, dtype)
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def small_folder(small, tmp_path_factory):
    """That model, to be opened."""
    folder = tmp_path_factory.mktemp("small")
    small.hf.save_pretrained(folder)
    small.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def draw(random):
    """A function of the model and the number of rows: random masks and values of the model's shape."""

    def make(model, rows=5, p=0.4, per_row=False):
        s = model.shape
        masks = torch.rand(rows, s.n_layers, s.n_heads, generator=random) < p
        lead = (rows,) if per_row else ()
        return masks, torch.randn(*lead, s.n_layers, s.n_heads, s.head_dim, generator=random)

    return make


__all__ = ["FAMILIES", "KINDS", "PACKED", "engine", "unpacked"]
