"""What tests of models and uses share that break fast ways: an oracle that hooks transformers' own model."""

import pytest
import torch

import engine
import models
from bench.survey import apart, oracle
from models import zoo

IDS = list(range(1, 31))
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LIMIT = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def random_(hf):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models.tiny._randomize(hf)
    return hf.eval()


def wrapped(hf, name="new"):
    return models.wrap(hf, zoo.tiny_tokenizer(), name=name)


def given(model, rows=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    s = model.shape
    heads = torch.rand(rows, s.n_layers, s.n_heads, generator=random) < 0.4
    return dict(heads=heads, values=torch.randn(s.n_layers, s.n_heads, s.head_dim, generator=random))


def by_hooks(model, ids, heads, values, positions=(-1,)):
    return torch.stack([oracle(model, model.hf, list(ids), row, values, positions) for row in heads])


def exact(model, ids=IDS, strategy="auto", **options):
    """One prompt against the oracle."""
    asked = given(model) | options
    got = engine.patch(model, ids, strategy=strategy, **asked)
    want = by_hooks(model, ids if isinstance(ids, list) else ids.tokens.tolist(), **asked)
    assert apart(got, want) <= LIMIT


def packs(model):
    return engine.plan(model, IDS, rows=4).strategy == "packed"
