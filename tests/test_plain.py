"""The oracle of sites by itself: what its sites are to each other, and that nothing of it stays behind."""

import pytest
import torch

from tests import plain
from tests.plain import LAYOUTS, Layout

IDS = torch.randint(97, (13,), generator=torch.Generator().manual_seed(3)).tolist()
QUICK = ("llama", "gpt2", "gemma2", "qwen3", "gpt_neox", "mixtral", "opt", "gpt_oss", "bloom", "qwen3_vl")
FAMILIES = [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in LAYOUTS]
# Their own softmax is in float32.
ROUGH = {"gemma2": 1e-5}
CLOSE = dict(atol=1e-9, rtol=0)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def double():
    """A function of the family: a tiny model in float64, made once."""
    known = {}

    def make(family):
        if family not in known:
            known[family] = plain.made(family, torch.float64)
        return known[family]

    return make


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def noise(like, seed=0):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def everywhere(hf, family, function, *sites):
    return [(site, layer, function) for site in sites for layer in range(plain.n_layers(hf, family))]


def test_every_text_family_is_here():
    assert set(plain.tiny.TEXT) <= set(LAYOUTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dtypes(double, family):
    want = plain.made(family)(input_ids=torch.tensor([IDS])).logits
    torch.testing.assert_close(double(family)(input_ids=torch.tensor([IDS])).logits.float(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing(double, family):
    """Also: after any call all is as before."""
    hf, sites = double(family), LAYOUTS[family].sites()
    want = hf(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in m.__dict__) for m in hf.modules()]
    attention = [c._attn_implementation for c in plain._configs(hf)]
    for site in sites:
        got = plain.logits(hf, family, IDS, everywhere(hf, family, lambda x: x, site))
        torch.testing.assert_close(got, want, atol=ROUGH.get(family, 1e-9), rtol=0)
    with pytest.raises(ZeroDivisionError):
        plain.logits(hf, family, IDS, everywhere(hf, family, lambda x: x * (1 / 0), *sites))
    after = [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in m.__dict__) for m in hf.modules()]
    assert after == hooks
    assert [c._attn_implementation for c in plain._configs(hf)] == attention
    assert torch.equal(hf(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_called_once_a_layer_and_matters(double, family):
    hf, sites = double(family), LAYOUTS[family].sites()
    own, n = plain.logits(hf, family, IDS), plain.n_layers(hf, family)
    for site in sites:
        for layer in range(n):
            called = []
            moved = [(site, layer, lambda x, called=called: (called.append(x.shape), x + noise(x))[1])]
            assert (plain.logits(hf, family, IDS, moved) - own).abs().max() > 1e-4, (site, layer)
            assert len(called) == 1
            assert len(called[0]) == 3
            assert called[0][0] == len(IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_how_the_sites_hang_together(double, family):
    """Sums and products written by the definitions, on activations of a forward that is changed in part."""
    hf, layout = double(family), LAYOUTS[family]
    blocks = hf.get_submodule(layout.blocks)
    changes = [("z", 0, lambda x: x + noise(x)), ("resid_pre", 2, lambda x: x - noise(x))]
    x = plain.activations(hf, family, IDS, layout.sites(), changes)
    for layer, block in enumerate(blocks):
        at = {site: x[site][layer] for site in x}
        attended, mlp = at["attn_out"], at["mlp_out"]
        if layout.halves in (plain.GEMMA, plain.OLMO):
            attended = block.post_attention_layernorm(attended)
            mlp = block.post_feedforward_layernorm(mlp)
        if layout.halves:
            torch.testing.assert_close(at["resid_mid"], at["resid_pre"] + attended, **CLOSE)
            torch.testing.assert_close(at["resid_post"], at["resid_mid"] + mlp, **CLOSE)
        else:
            torch.testing.assert_close(at["resid_post"], at["resid_pre"] + attended + mlp, **CLOSE)
        w_o = block.get_submodule(layout.w_o)
        torch.testing.assert_close(at["attn_out"].flatten(1), w_o(at["z"].flatten(1)), **CLOSE)
        if layout.down:
            down = block.get_submodule(layout.down)
            torch.testing.assert_close(at["mlp_out"].flatten(1), down(at["mlp_act"].flatten(1)), **CLOSE)
        if layout.interface and layer != 0:  # z of layer 0 is changed
            groups = at["q"].shape[1] // at["k"].shape[1]
            v = at["v"].repeat_interleave(groups, 1)
            torch.testing.assert_close(torch.einsum("tks,skd->tkd", at["pattern"], v), at["z"], **CLOSE)
        if layer < len(blocks) - 1 and layer != 1:
            torch.testing.assert_close(at["resid_post"], x["resid_pre"][layer + 1], **CLOSE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if LAYOUTS[f.values[0]].interface])
def test_scores_and_pattern(double, family):
    """Causal, within windows, a softmax of each other; scores from queries and keys."""
    hf = double(family)
    x = plain.activations(hf, family, IDS, ["q", "k", "scores", "pattern"])
    n, config = len(IDS), hf.config.get_text_config()
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for layer, (scores, pattern) in enumerate(zip(x["scores"], x["pattern"], strict=True)):
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 3
        window = getattr(config, "sliding_window", None) if kinds[layer] == "sliding_attention" else None
        if family == "phi3":
            window = config.sliding_window
        sees = causal & ~causal.tril(-window) if window else causal
        assert torch.equal(scores.isfinite(), sees[:, None].expand_as(scores)), (layer, window)
        assert torch.equal(pattern > 0, sees[:, None].expand_as(scores))
        if family == "gpt_oss":
            assert (pattern.sum(-1) < 1).all()  # the sink has the rest
        else:
            torch.testing.assert_close(scores.softmax(-1), pattern, **CLOSE)
        q, k = x["q"][layer], x["k"][layer]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        raw = torch.einsum("tkd,skd->tks", q, k)[sees[:, None].expand_as(scores)]
        seen = scores[scores.isfinite()]
        if family == "gemma2":
            seen = 5.0 * torch.atanh(seen / 5.0)
        ratio = seen / raw
        scaling = {"opt": 1.0, "gemma2": 24**-0.5, "gemma3": 24**-0.5, "gemma3_vl": 24**-0.5}
        assert (ratio - scaling.get(family, q.shape[-1] ** -0.5)).abs().max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_residual_stream_is_all_that_is_left(double, family):
    """Replaced by a constant, the logits are those of any other prompt."""
    hf = double(family)
    last = plain.n_layers(hf, family) - 1
    constant = [("resid_post", last, lambda x: torch.ones_like(x))]
    got = [plain.logits(hf, family, ids, constant) for ids in (IDS, IDS[::-1], IDS[3:9])]
    torch.testing.assert_close(got[0], got[1], **CLOSE)
    torch.testing.assert_close(got[0], got[2], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_z_attention_gives_its_bias(double, family):
    hf, layout = double(family), LAYOUTS[family]
    nothing = everywhere(hf, family, torch.zeros_like, "z")
    x = plain.activations(hf, family, IDS, ["attn_out"], nothing)["attn_out"]
    for layer, block in enumerate(hf.get_submodule(layout.blocks)):
        bias = getattr(block.get_submodule(layout.w_o), "bias", None)
        want = torch.zeros_like(x[layer]) if bias is None else bias.expand_as(x[layer])
        torch.testing.assert_close(x[layer], want, **CLOSE)
    if layout.interface:
        want = plain.logits(hf, family, IDS, nothing)
        got = plain.logits(hf, family, IDS, everywhere(hf, family, lambda x: x * 0, "pattern"))
        torch.testing.assert_close(got, want, **CLOSE)
        got = plain.logits(hf, family, IDS, everywhere(hf, family, lambda x: x * 0, "v"))
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if LAYOUTS[f.values[0]].interface])
def test_a_key_knocked_out_is_a_pattern_renormalised(double, family):
    hf, layer, key = double(family), 1, len(IDS) - 3
    heads = torch.zeros(plain.n_layers(hf, family), hf.config.get_text_config().num_attention_heads, dtype=torch.bool)
    heads[layer, 1:4] = True
    x = plain.activations(hf, family, IDS, ["pattern"], plain.knocked_out(heads, [key], [-1, -2]))["pattern"]
    own = plain.activations(hf, family, IDS, ["pattern"])["pattern"]
    want = own.clone()
    for at in (-1, -2):
        want[layer, at, 1:4, key] = 0
        if family == "gpt_oss":
            left = own[layer, at, 1:4, key]
            want[layer, at, 1:4] /= 1 - left[:, None]
        else:
            want[layer, at, 1:4] /= want[layer, at, 1:4].sum(-1, keepdim=True)
    torch.testing.assert_close(x[: layer + 1], want[: layer + 1], **CLOSE)

    def renormalised(p):
        return want[layer]

    got = plain.logits(hf, family, IDS, plain.knocked_out(heads, [key], [-1, -2]))
    torch.testing.assert_close(got, plain.logits(hf, family, IDS, [("pattern", layer, renormalised)]), **CLOSE)
    assert (got - plain.logits(hf, family, IDS)).abs().max() > 1e-4


@pytest.mark.parametrize("family", [f for f in FAMILIES if LAYOUTS[f.values[0]].halves])
def test_resid_mid_is_read_by_the_mlp_and_added_to(double, family):
    """With v for all tokens, the block gives v and its own MLP branch of v, whatever the prompt and attention."""
    hf, layout = double(family), LAYOUTS[family]
    block = hf.get_submodule(layout.blocks)[1]
    v = None

    def becomes(x):
        nonlocal v
        v = noise(x[0]).expand_as(x)
        return v

    x = plain.activations(hf, family, IDS, ["mlp_out", "resid_post"], [("resid_mid", 1, becomes)])
    norm = {"gpt2": "ln_2", "opt": "final_layer_norm"}.get(family, "post_attention_layernorm")
    after = torch.nn.Identity()
    if layout.halves == plain.GEMMA:
        norm, after = "pre_feedforward_layernorm", block.post_feedforward_layernorm
    if layout.halves == plain.OLMO:
        norm, after = None, block.post_feedforward_layernorm
    read = block.get_submodule(norm)(v[:, 0]) if norm else v[:, 0]
    if family == "opt":
        branch = block.fc2(torch.relu(block.fc1(read)))
    elif family == "bloom":
        branch = block.mlp(read, torch.zeros_like(read))
    else:
        branch = block.mlp(read[None])
        branch = branch[0][0] if isinstance(branch, tuple) else branch[0]
    torch.testing.assert_close(x["mlp_out"][1][:, 0], branch, **CLOSE)
    torch.testing.assert_close(x["resid_post"][1][:, 0], v[:, 0] + after(branch), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_is_seen_from_its_token_and_layer_on(double, family):
    hf, layout = double(family), LAYOUTS[family]
    sites = [s for s in layout.sites() if s not in plain.ATTENTION]
    own = plain.activations(hf, family, IDS, sites)
    for site in sites:
        units = torch.zeros(own[site].shape[0], own[site].shape[2], dtype=torch.bool)
        units[1, 0] = True
        x = plain.activations(hf, family, IDS, sites, plain.patched(site, units, 2.0, [-3]))
        for other in sites:
            torch.testing.assert_close(x[other][0], own[other][0], **CLOSE)
            torch.testing.assert_close(x[other][:, :-3], own[other][:, :-3], **CLOSE)
        assert (x[site][1, -3, 0] == 2).all()
        torch.testing.assert_close(x[site][1, -3, 1:], own[site][1, -3, 1:], **CLOSE)
        torch.testing.assert_close(x[site][1, -2:], own[site][1, -2:], **CLOSE)
        assert (x["resid_post"][1, -3] - own["resid_post"][1, -3]).abs().max() > 1e-6
        assert (x["resid_post"][2, -1] - own["resid_post"][2, -1]).abs().max() > 1e-9


def test_order_and_modes(double):
    hf = double("llama")
    own = plain.activations(hf, "llama", IDS, ["z"])["z"]
    units = torch.zeros(3, 6, dtype=torch.bool)
    units[0, 2] = True
    values = noise(own[None, :, 0])
    add = plain.patched("z", units, values, [4], "add")
    scale = plain.patched("z", units, -2.0, [4], "scale")
    v = values[0, 0, 2]
    for changes, want in ((add + scale, -2 * (own[0, 4, 2] + v)), (scale + add, v - 2 * own[0, 4, 2])):
        got = plain.activations(hf, "llama", IDS, ["z"], changes)["z"][0]
        torch.testing.assert_close(got[4, 2], want, **CLOSE)
    by_position = torch.cat([values, 2 * values])
    got = plain.activations(hf, "llama", IDS, ["z"], plain.patched("z", units, by_position, [4, -1]))["z"][0]
    torch.testing.assert_close(got[[4, -1], 2], torch.stack([v, 2 * v]), **CLOSE)


def test_sites_that_a_family_has_not():
    hf = plain.made("gpt_neox")
    assert Layout().sites() == list(plain.SITES)
    assert "resid_mid" not in LAYOUTS["gpt_neox"].sites()
    with pytest.raises(ValueError, match="gpt_neox has no resid_mid"):
        plain.logits(hf, "gpt_neox", IDS, [("resid_mid", 0, lambda x: x)])
