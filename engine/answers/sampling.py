"""The next token of a row: the likeliest, or one drawn as a transformers `GenerationConfig` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from models.shapes import Float, Int

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Settings of a config by the class of transformers that carries each out, in the order in which `generate` does.
PENALTIES = {
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
    "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
    "suppress_tokens": "SuppressTokensLogitsProcessor",
}
WARPERS = {
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
}
# Read elsewhere, or of no consequence for the tokens.
OTHERS = frozenset(
    {
        "do_sample",
        "max_new_tokens",
        "eos_token_id",
        "stop_strings",
        "pad_token_id",
        "bos_token_id",
        "use_cache",
        "cache_implementation",
        "disable_compile",
        "transformers_version",
    }
)
OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "temperature": (1.0,), "top_p": (1.0,), "top_k": (0,),
    "typical_p": (1.0,), "repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "min_length": (0,),
    "min_new_tokens": (0,), "length_penalty": (1.0,), "diversity_penalty": (0.0,), "num_beam_groups": (1,),
    "encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "guidance_scale": (1.0,),
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen: by transformers' processors, in order; drawn, or the likeliest.

    seed: of the draws: an answer's depend on it and on the answer's place among all, not on what runs beside it.
    """

    processors: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
    draws: bool = False
    seed: int = 0

    def generator(self, answer: int) -> Generator:
        """Of the draws of one answer."""
        return Generator().manual_seed((self.seed * 1_000_003 + answer) % 2**63)

    def choose(
        self, before: Int[Tensor, "rows tokens"], logits: Float[Tensor, "rows vocab"], random: list[Generator]
    ) -> Int[Tensor, " rows"]:
        """A token for each row; before: prompt and answer so far."""
        scores = logits if not (self.processors or self.draws) else logits.float()
        for processor in self.processors:
            scores = processor(before, scores)
        if not self.draws:
            return scores.argmax(dim=-1)
        p = scores.softmax(dim=-1).cpu()
        drawn = [torch.multinomial(one, 1, generator=draw) for one, draw in zip(p, random, strict=True)]
        return torch.cat(drawn).to(logits.device)


def read_config(config: GenerationConfig | None, seed: int) -> Choice:
    """A transformers `GenerationConfig` as a choice. What it leaves unset is off, also where `generate` has a default.

    Raises TypeError for anything else, ValueError naming what rows beside each other cannot do: `engine.start` hands
    such over to transformers.

    >>> read_config(GenerationConfig(do_sample=True, temperature=0.7), seed=0).draws
    True
    """
    if config is None:
        return Choice()
    from transformers import GenerationConfig, generation

    if not isinstance(config, GenerationConfig):
        raise TypeError(f"config must be a transformers GenerationConfig, got {type(config).__name__}")
    given = {key: x for key, x in config.to_dict().items() if x is not None and x is not False and key[0] != "_"}
    given = {key: x for key, x in given.items() if x not in OFF.get(key, ())}
    known = OTHERS | PENALTIES.keys() | WARPERS.keys()
    if unknown := sorted(given.keys() - known):
        said = ", ".join(f"{key}={given[key]!r}" for key in unknown)
        raise ValueError(
            f"rows cannot be generated with {said}: hand them over, model.hf.generate(**engine.start(...))"
        )
    draws = bool(config.do_sample)
    if idle := [] if draws else sorted(given.keys() & WARPERS.keys()):
        raise ValueError(f"{', '.join(idle)} are of sampling: give do_sample=True too, or leave them out")
    kinds = PENALTIES | (WARPERS if draws else {})
    processors = tuple(getattr(generation, kind)(given[key]) for key, kind in kinds.items() if key in given)
    return Choice(processors, draws, seed)
