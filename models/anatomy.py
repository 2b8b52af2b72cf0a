"""Where things are in a transformers model: its blocks, their output projections, its sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.interface import Shape, UnsupportedModelError

# A decoder block's attention, and in it the output projection W_O, whose input is z.
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention", "cross_attn", "multi_head_attention")
MIXERS = ("mixer", "temporal_block")  # of hybrids: attention if they have an o_proj, else something else
PROJECTIONS = ("o_proj.linear", "o_proj", "c_proj", "out_proj", "dense", "output.dense", "attention.out_proj", "Wo")
UNBOUNDED = 2**20  # context of models that name none (ALiBi)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model's parts, as long as `modules` and `weights` are what it consists of.

    projections: W_O of each layer with heads. attentions: the modules they lie in.
    blocks:      the blocks around those; whole: no other block stands between them.
    stack:       the module that has the list of the blocks, and by which name.
    remembering: modules that keep something of what they have seen: positions of images, rotary tables that grow.
    """

    modules: list[nn.Module]
    weights: list[Tensor]
    projections: list[nn.Module]
    attentions: list[nn.Module]
    blocks: list[nn.Module]
    whole: bool
    stack: tuple[nn.Module, str]
    remembering: list[nn.Module]
    shape: Shape

    def has_its_blocks(self) -> bool:
        """Nearly as good as `consists_of`, in microseconds."""
        owner, name = self.stack
        here = owner._modules.get(name)
        return not self.whole or (here is not None and list(here._modules.values()) == self.blocks)

    def consists_of(self, modules: Sequence[nn.Module], weights: Sequence[Tensor]) -> bool:
        return [*map(id, modules), *map(id, weights)] == [*map(id, self.modules), *map(id, self.weights)]


def dissect(decoder: nn.Module, config: Any, names: Sequence[str] | None, root: nn.Module) -> Anatomy:
    """The parts of a model; names: of its output projections, if its layout is not known.

    Raises UnsupportedModelError if no output projections are found, or layers have different numbers of heads.
    """
    paths = list(names or find_projections(decoder, config))
    top = root if names else decoder
    projections = [top.get_submodule(path) for path in paths]
    attentions = [top.get_submodule(path.rpartition(".")[0]) for path in paths]
    blocks, whole, stack = find_blocks(top, paths)
    modules, weights = parts(root)
    remembering = [m for m in modules if hasattr(m, "rope_deltas") or "dynamic" in str(getattr(m, "rope_type", ""))]
    shape = read_shape(config, projections, attentions)
    return Anatomy(modules, weights, projections, attentions, blocks, whole, stack, remembering, shape)


def parts(root: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """All modules and weights, repeated ones too; offloaded weights (meta) are put in anew at every call, and left out.

    `named_modules` takes ten times as long, and this is asked at every call.
    """
    modules, weights, stack = [], [], [root]
    while stack:
        module = stack.pop()
        modules.append(module)
        here = module.__dict__
        if own := here["_parameters"]:
            weights += [weight for weight in own.values() if weight is not None and not weight.is_meta]
        if children := here["_modules"]:
            stack += [child for child in children.values() if child is not None]
    return modules, weights


def find_projections(decoder: nn.Module, config: Any) -> list[str]:
    """The names of the attention output projections, W_O of each decoder layer that has attention, in order."""
    n_layers = read_field(config, "num_hidden_layers")
    for name, stack in _own_modules(decoder, config):
        if not isinstance(stack, nn.ModuleList) or len(stack) != n_layers:
            continue
        found = [(i, at) for i, block in enumerate(stack) if (at := find_projection(block)) is not None]
        if found and all(at for _, at in found):
            return [f"{name}.{i}.{at}" for i, at in found]
    raise UnsupportedModelError(
        f"no attention output projections found in {type(decoder).__name__}: looked for a list of {n_layers} blocks, "
        f"each with one of {ATTENTIONS} that has one of {PROJECTIONS}; declare them: "
        "models.wrap(model, projections=[...]), a dotted module name a layer"
    )


def _own_modules(decoder: nn.Module, config: Any, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a decoder, less those of models within it that have configs of their own: they see, or hear."""
    yield name, decoder
    for child_name, child in decoder.named_children():
        inner: Any = getattr(child, "config", None) if hasattr(child, "get_input_embeddings") else None
        if inner is None or inner.get_text_config() == config:
            yield from _own_modules(child, config, f"{name}.{child_name}" if name else child_name)


def find_projection(block: nn.Module) -> str | None:
    """W_O within a block, empty if it is not found; None if the block has no attention."""
    for attention in (*ATTENTIONS, *MIXERS):
        if isinstance(inner := getattr(block, attention, None), nn.Module):
            if attention in MIXERS:
                return f"{attention}.o_proj" if hasattr(inner, "o_proj") else None
            named = dict(inner.named_modules())
            return next((f"{attention}.{name}" for name in PROJECTIONS if name in named), "")
    return None


def find_blocks(top: nn.Module, paths: Sequence[str]) -> tuple[list[nn.Module], bool, tuple[nn.Module, str]]:
    """The blocks that the projections lie in, if they stand in one list; whether in all of it; where it is."""
    split = [path.split(".") for path in paths]
    for n in range(1, min(map(len, split))):
        stack = top.get_submodule(".".join(split[0][: n - 1]))
        indices = [path[n - 1] for path in split]
        same = len({tuple(path[: n - 1]) for path in split}) == 1
        if isinstance(stack, nn.ModuleList) and same and len(set(indices)) == len(paths):
            owner = top.get_submodule(".".join(split[0][: n - 2]))
            blocks = [stack[int(i)] for i in indices]
            return blocks, list(map(str, range(len(stack)))) == indices, (owner, split[0][n - 2])
    return [], False, (top, "")


def input_width(projection: nn.Module) -> int:
    """Heads times head_dim. Quantised weights are stored in other shapes; transformers' Conv1D stores [in, out]."""
    if (width := getattr(projection, "in_features", None)) is not None:
        return width
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnsupportedModelError(f"an output projection is a {type(projection).__name__}, not one linear layer")
    return weight.shape[0] if type(projection).__name__ == "Conv1D" else weight.shape[1]


def read_field(config: Any, name: str) -> Any:
    """Raises UnsupportedModelError where a config has no such field, or one a layer."""
    try:
        return getattr(config, name)
    except Exception as error:  # transformers has errors of its own for fields that differ by layer
        said = str(error).splitlines()[0]
        raise UnsupportedModelError(f"{type(config).__name__} says no {name} for all layers: {said}") from error


def read_shape(config: Any, projections: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> Shape:
    n_heads = read_field(config, "num_attention_heads")
    widths = [input_width(projection) for projection in projections]
    for layer, (attention, width) in enumerate(zip(attentions, widths, strict=True)):
        named = [getattr(attention, name, None) for name in ("num_heads", "n_heads")]
        own = next((count for count in named if isinstance(count, int)), n_heads)
        if own != n_heads or width % n_heads:
            raise UnsupportedModelError(
                f"layer {layer} has {own} heads in {width} numbers, where the config says {n_heads}: a mask "
                "[rows, layers, heads] needs as many in every layer"
            )
    head_dims = tuple(width // n_heads for width in widths)
    kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    rope = getattr(config, "rope_parameters", None) or {}
    grows = "dynamic" in str(rope.get("rope_type", ""))  # its tables grow with the prompt
    return Shape(
        n_layers=len(projections),
        n_heads=n_heads,
        n_kv_heads=kv_heads if isinstance(kv_heads, int) else max(kv_heads),
        head_dim=max(head_dims),
        d_model=read_field(config, "hidden_size"),
        vocab_size=getattr(config, "vocab_size", 0),  # encoders of pictures have none
        max_tokens=UNBOUNDED if grows else getattr(config, "max_position_embeddings", None) or UNBOUNDED,
        head_dims=head_dims if len(set(head_dims)) > 1 else (),
    )


def read_eos(hf: nn.Module) -> frozenset[int]:
    """End-of-answer tokens, from the generation config: one id, several, or none."""
    config = getattr(hf, "generation_config", None) or hf.config
    eos = getattr(config, "eos_token_id", None)
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
