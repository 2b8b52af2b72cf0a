"""Where things are in a transformers model: its blocks, their output projections, its sizes; and what it rules out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.interface import Shape, UnsupportedModelError

# A decoder block's attention, and in it the output projection W_O, whose input is z.
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention", "cross_attn")
PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "output.dense")
UNBOUNDED = 2**20  # context of models that name none (ALiBi)


def find_projections(decoder: nn.Module, n_layers: int) -> list[nn.Module]:
    """The attention output projection W_O of each decoder layer, in order."""
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    for stack in stacks:
        found = []
        for block in stack:
            attention = find_attention(block)
            named = dict(attention.named_modules()) if attention is not None else {}
            found += [named[name] for name in PROJECTIONS if name in named][:1]
        if len(found) == n_layers:
            return found
    raise UnsupportedModelError(
        f"no attention output projections found in {type(decoder).__name__}: looked for a list of {n_layers} blocks, "
        f"each with one of {ATTENTIONS} that has one of {PROJECTIONS}; declare them: "
        "models.wrap(model, projections=[...]), a dotted module name a layer"
    )


def find_blocks(decoder: nn.Module, projections: Sequence[nn.Module]) -> list[nn.Module]:
    """The decoder blocks that the projections lie in, if they are the modules of one list; else none."""
    names = {id(module): name.split(".") for name, module in decoder.named_modules()}
    paths = [names.get(id(projection), []) for projection in projections]
    for n in range(1, min(map(len, paths))):
        stack = decoder.get_submodule(".".join(paths[0][: n - 1]))
        if isinstance(stack, nn.ModuleList) and list(map(str, range(len(stack)))) == [path[n - 1] for path in paths]:
            return list(stack)
    return []


def find_attention(block: nn.Module) -> nn.Module | None:
    return next((getattr(block, name) for name in ATTENTIONS if hasattr(block, name)), None)


def read_shape(config: Any, projections: Sequence[nn.Module]) -> Shape:
    n_heads = config.num_attention_heads
    projection = projections[0]
    weight: Tensor = projection.weight  # type: ignore[assignment]
    # transformers' Conv1D stores [in, out], Linear [out, in]; the input is heads * head_dim wide.
    width = weight.shape[0] if type(projection).__name__ == "Conv1D" else weight.shape[1]
    return Shape(
        n_layers=len(projections),
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=width // n_heads,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        max_tokens=getattr(config, "max_position_embeddings", None) or UNBOUNDED,
    )


def read_eos(hf: nn.Module) -> frozenset[int]:
    """End-of-answer tokens, from the generation config: one id, several, or none."""
    config = getattr(hf, "generation_config", None) or hf.config
    eos = getattr(config, "eos_token_id", None)
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


def why_not_shared(decoder: nn.Module) -> str:
    """Why no prefix is independent of what follows it; empty if it is."""
    for module in decoder.modules():
        if hasattr(module, "cross_attn"):
            return "it has cross-attention layers, whose keys and values are not those of its tokens"
        if getattr(module, "is_causal", True) is False:
            return "its tokens see those that follow them"
    return ""


def why_not_packed(hf: nn.Module, config: Any) -> str:
    """Why packed rows would not be exact; empty if they are. Refuses what it does not know to be right."""
    if not getattr(hf, "_supports_attention_backend", False):
        return f"{type(hf).__name__} does not go through transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}, which packed rows do not follow"
    return ""
