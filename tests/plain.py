"""Sites read and changed by plain hooks on transformers' own models: the oracle of tests, which knows no engine.

A change is (site, layer, function) with function(x) -> x, x [tokens, units, width] of the one row of a forward. Several
at one site and layer apply in order. Blocks with a resid_mid are written out by hand; attention is, too, where q, k, v,
scores or pattern are asked for.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from models import tiny

Change = tuple[str, int, Callable[[Tensor], Tensor]]

ATTENTION = ("q", "k", "v", "scores", "pattern")
# In the order in which a block comes by them.
SITES = (
    "resid_pre", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post",
)  # fmt: skip


# Blocks in two halves: up to the residual stream with attention added, and from there on. rest: what else the block is
# given, by name.


def _llama_first(block: Any, h: Tensor, rest: dict[str, Any]) -> Tensor:
    return h + block.self_attn(hidden_states=block.input_layernorm(h), **rest)[0]


def _llama_second(block: Any, mid: Tensor) -> Tensor:
    out = block.mlp(block.post_attention_layernorm(mid))
    return mid + (out[0] if isinstance(out, tuple) else out)


def _gemma_first(block: Any, h: Tensor, rest: dict[str, Any]) -> Tensor:
    attended = block.self_attn(hidden_states=block.input_layernorm(h), **rest)[0]
    return h + block.post_attention_layernorm(attended)


def _gemma_second(block: Any, mid: Tensor) -> Tensor:
    return mid + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(mid)))


def _olmo_first(block: Any, h: Tensor, rest: dict[str, Any]) -> Tensor:
    return h + block.post_attention_layernorm(block.self_attn(hidden_states=h, **rest)[0])


def _olmo_second(block: Any, mid: Tensor) -> Tensor:
    return mid + block.post_feedforward_layernorm(block.mlp(mid))


def _gpt2_first(block: Any, h: Tensor, rest: dict[str, Any]) -> Tensor:
    rest = {key: x for key, x in rest.items() if not key.startswith("encoder_")}
    return h + block.attn(block.ln_1(h), **rest)[0]


def _gpt2_second(block: Any, mid: Tensor) -> Tensor:
    return mid + block.mlp(block.ln_2(mid))


def _opt_first(block: Any, h: Tensor, rest: dict[str, Any]) -> Tensor:
    return h + block.self_attn(hidden_states=block.self_attn_layer_norm(h), **rest)[0]


def _opt_second(block: Any, mid: Tensor) -> Tensor:
    return mid + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(mid))))


def _bloom_first(block: Any, h: Tensor, rest: dict[str, Any]) -> Tensor:
    return block.self_attention(block.input_layernorm(h), h, **rest)[0]  # which adds h itself


def _bloom_second(block: Any, mid: Tensor) -> tuple[Tensor, None]:
    return block.mlp(block.post_attention_layernorm(mid), mid), None  # as does this


def _falcon_first(block: Any, h: Tensor, rest: dict[str, Any]) -> Tensor:
    return h + block.self_attention(block.input_layernorm(h), **rest)[0]


def _falcon_second(block: Any, mid: Tensor) -> tuple[Tensor, None]:
    return mid + block.mlp(block.post_attention_layernorm(mid)), None


LLAMA = (_llama_first, _llama_second)
GEMMA = (_gemma_first, _gemma_second)
OLMO = (_olmo_first, _olmo_second)


class Layout(NamedTuple):
    """Where a family's sites are.

    blocks:    the list of them, in the model. attention, w_o, mlp_out, down: in a block.
    halves:    the block written out; None for parallel blocks, which have no resid_mid.
    interface: whether attention goes through transformers' interface, where q, k, v, scores and pattern are.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    w_o: str = "self_attn.o_proj"
    mlp_out: str = "mlp"
    down: str | None = "mlp.down_proj"
    halves: tuple[Callable[..., Tensor], Callable[..., Any]] | None = LLAMA
    interface: bool = True

    def sites(self) -> list[str]:
        """Those that the family has."""
        none = () if self.interface else ATTENTION
        none += () if self.halves else ("resid_mid",)
        none += () if self.down else ("mlp_act",)
        return [site for site in SITES if site not in none]


_SEES = Layout("model.language_model.layers")
_FALCON = Layout("transformer.h", "self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h", None, False)

LAYOUTS = {
    "gpt2": Layout("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj", (_gpt2_first, _gpt2_second)),
    "gptj": Layout("transformer.h", "attn", "attn.out_proj", "mlp", "mlp.fc_out", None, False),
    "gpt_neox": Layout("gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", None),
    "opt": Layout(
        "model.decoder.layers", "self_attn", "self_attn.out_proj", "fc2", "fc2", (_opt_first, _opt_second)
    ),  # no module around the MLP
    "llama": Layout(),
    "mistral": Layout(),
    "mixtral": Layout(down=None),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "gemma2": Layout(halves=GEMMA),
    "gemma3": Layout(halves=GEMMA),
    "phi3": Layout(),
    "falcon": _FALCON,
    "falcon_alibi": _FALCON._replace(halves=(_falcon_first, _falcon_second)),
    # The modules around its attention and its MLP give the residual stream, too.
    "bloom": _FALCON._replace(mlp_out="mlp.dense_4h_to_h", halves=(_bloom_first, _bloom_second)),
    "olmo2": Layout(halves=OLMO),
    "gpt_oss": Layout(down=None),  # sinks
    "llava": _SEES,
    "idefics3": _SEES._replace(blocks="model.text_model.layers"),
    "qwen2_vl": _SEES,
    "qwen3_vl": _SEES,
    "gemma3_vl": _SEES._replace(halves=GEMMA),
}


def made(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model of the family; besides those of `tiny`, gpt_oss."""
    if family == "gpt_oss":
        import transformers

        none = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
        config = transformers.GptOssConfig(
            **none, vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=7, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hf = transformers.GptOssForCausalLM(config)
            tiny._randomize(hf)
    else:
        hf = tiny.tiny(family)
    hf = hf.to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        hf.set_experts_implementation("eager")  # grouped products know no float64
        for module in list(hf.modules()):
            for name, norm in module.named_children():
                if type(norm).__name__.endswith("RMSNorm"):
                    setattr(module, name, Norm(norm))
    return hf


class Norm(nn.Module):
    """An RMSNorm in the dtype of what it is given: transformers' own are in float32, also of float64."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.offset = float(type(norm).__name__.startswith("Gemma"))  # around zero

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def n_layers(hf: Any, family: str) -> int:
    return len(hf.get_submodule(LAYOUTS[family].blocks))


def logits(hf: Any, family: str, ids: Sequence[int], changes: Iterable[Change] = (), **inputs: Tensor) -> Tensor:
    """The last token's logits, changed; one forward of one row. inputs: pixels and such."""
    with changed(hf, family, changes):
        return hf(input_ids=torch.as_tensor(ids)[None], use_cache=False, **inputs).logits[0, -1]


def activations(
    hf: Any, family: str, ids: Sequence[int], sites: Iterable[str], changes: Iterable[Change] = (), **inputs: Tensor
) -> dict[str, Tensor]:
    """By site, x [layers, tokens, units, width] after all changes."""
    found: dict[str, dict[int, Tensor]] = {site: {} for site in sites}

    def looks(site: str, layer: int) -> Change:
        def look(x: Tensor) -> Tensor:
            found[site][layer] = x.clone()
            return x

        return site, layer, look

    looking = [looks(site, layer) for site in found for layer in range(n_layers(hf, family))]
    logits(hf, family, ids, [*changes, *looking], **inputs)
    return {site: torch.stack([x for _, x in sorted(by.items())]) for site, by in found.items()}


def patched(
    site: str,
    units: Tensor,
    values: Tensor | float,
    positions: Iterable[int] = (-1,),
    mode: str = "replace",
) -> list[Change]:
    """Changes of one row. units: Bool[layers, units]; values: a number, or [positions or 1, layers, units, width]."""

    def one(layer: int) -> Change:
        def change(x: Tensor) -> Tensor:
            new = [*x.unbind(0)]  # tokens, each [units, width]
            for i, at in enumerate(positions):
                old = new[at]
                value = values[i if len(values) > 1 else 0, layer] if isinstance(values, Tensor) else values
                value = torch.as_tensor(value, dtype=old.dtype).expand_as(old)
                becomes = {"replace": value, "add": old + value, "scale": old * value}[mode]
                new[at] = torch.where(units[layer][:, None], becomes, old)
            return torch.stack(new)

        return site, layer, change

    return [one(layer) for layer in range(len(units)) if units[layer].any()]


def knocked_out(heads: Tensor, keys: Sequence[int], positions: Iterable[int] = (-1,)) -> list[Change]:
    """Changes of one row: these heads, Bool[layers, heads], at these positions do not attend to the keys."""

    def one(layer: int) -> Change:
        def change(scores: Tensor) -> Tensor:
            hidden = torch.zeros_like(scores, dtype=torch.bool)
            for at in positions:
                for key in keys:
                    hidden[at, :, key] = heads[layer]
            return scores.masked_fill(hidden, -torch.inf)

        return "scores", layer, change

    return [one(layer) for layer in range(len(heads)) if heads[layer].any()]


@contextmanager
def changed(hf: Any, family: str, changes: Iterable[Change]) -> Iterator[None]:
    """Within: forwards of one row are changed. After: the model is as it was."""
    layout = LAYOUTS[family]
    blocks = hf.get_submodule(layout.blocks)
    places: dict[tuple[str, int], list[Callable[[Tensor], Tensor]]] = {}
    for site, layer, function in changes:
        if site not in layout.sites():
            raise ValueError(f"{family} has no {site}")
        places.setdefault((site, layer), []).append(function)
    attentions = [block.get_submodule(layout.attention) for block in blocks]
    attending: dict[int, dict[str, list[Callable[[Tensor], Tensor]]]] = {id(module): {} for module in attentions}
    with ExitStack() as undo:
        for (site, layer), functions in places.items():
            block = blocks[layer]
            if site in ATTENTION:
                attending[id(attentions[layer])][site] = functions
            elif site == "resid_mid":
                undo.enter_context(_by_halves(block, layout.halves, functions))
            else:
                undo.callback(_hook(hf, block, layout, site, functions).remove)
        if any(attending.values()):
            undo.enter_context(_attention(hf, {type(module).__module__ for module in attentions}, attending))
        yield


def _apply(functions: Iterable[Callable[[Tensor], Tensor]], x: Tensor, units: int) -> Tensor:
    """x: [tokens, ...] or [1, tokens, ...] with units * width numbers a token."""
    new = x.reshape(-1, units, x.shape[-1] // units).clone()
    for function in functions:
        new = function(new)
    return new.reshape(x.shape)


def _hook(
    hf: Any, block: nn.Module, layout: Layout, site: str, functions: list[Callable[[Tensor], Tensor]]
) -> torch.utils.hooks.RemovableHandle:
    given, path = {
        "resid_pre": (True, ""),
        "resid_post": (False, ""),
        "z": (True, layout.w_o),
        "attn_out": (False, layout.w_o),
        "mlp_act": (True, layout.down),
        "mlp_out": (False, layout.mlp_out),
    }[site]
    module = block.get_submodule(path) if path else block
    heads = hf.config.get_text_config().num_attention_heads

    def units(x: Tensor) -> int:
        return {"z": heads, "mlp_act": x.shape[-1]}.get(site, 1)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_apply(functions, args[0], units(args[0])), *args[1:]), kwargs
        x = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": _apply(functions, x, units(x))}

    def after(_: Any, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (_apply(functions, out[0], 1), *out[1:])
        return _apply(functions, out, 1)

    if given:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@contextmanager
def _by_halves(block: Any, halves: Any, functions: list[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within: the block runs as written out above, the stream changed between its halves."""
    first, second = halves
    own = inspect.signature(type(block).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = own.bind(block, *args, **kwargs).arguments
        rest = {key: x for key, x in given.items() if key not in ("self", "hidden_states", "kwargs")}
        mid = first(block, given["hidden_states"], rest | given.get("kwargs", {}))
        return second(block, _apply(functions, mid, 1))

    with patch.object(block, "forward", forward):
        yield


@contextmanager
def _attention(hf: Any, modules: set[str], changes: dict[int, dict[str, Any]]) -> Iterator[None]:
    """Within: attention modules, by id, run the attention written here, other ones the eager one of their file."""
    before = [(config, config._attn_implementation) for config in _configs(hf)]

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **told: Any
    ) -> tuple[Tensor, Tensor]:
        if id(module) not in changes:
            return eager[type(module).__module__](module, q, k, v, mask, scaling=scaling, **told)
        change = changes[id(module)]

        def by_token(site: str, x: Tensor, always: Sequence[Callable[[Tensor], Tensor]] = ()) -> Tensor:
            """x: [1, units, tokens, width], changed; `always` comes before and after each change."""
            new = x[0].transpose(0, 1)
            for function in (*always, *(f for one in change.get(site, ()) for f in (one, *always))):
                new = function(new)
            return new.transpose(0, 1)[None]

        q, k, v = by_token("q", q), by_token("k", k), by_token("v", v)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if (cap := told.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        n = q.shape[2]
        sees = torch.ones(n, n, dtype=torch.bool).tril() if mask is None else mask[0, 0, :, :n] == 0
        hide = [lambda x: x.masked_fill(~sees[:, None], -torch.inf)]  # whatever a change says
        scores = by_token("scores", scores, hide)
        sinks = getattr(module, "sinks", None)
        whole = scores if sinks is None else torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
        pattern = by_token("pattern", whole.softmax(-1)[..., :n])
        return (pattern @ v).transpose(1, 2), pattern

    eager = {name: sys.modules[name].eager_attention_forward for name in modules}
    try:
        hf.set_attn_implementation("eager")
        with ExitStack() as stack:
            for name in modules:
                stack.enter_context(patch.object(sys.modules[name], "eager_attention_forward", attend))
            yield
    finally:
        for config, name in before:  # the whole before its parts
            config._attn_implementation = name


def _configs(hf: Any) -> list[Any]:
    """Of all parts of the model, each once."""
    found = {id(c): c for m in hf.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())
