"""Captions for classes, and a CLIP tokenizer whose words are theirs.

    python tests/benchmarks/training/captions.py --out tokenizer

writes the tokenizer: CLIP's 256 bytes, each also as a word's end, and as many merges as make every word of the captions
one token. Other words fall into smaller pieces, which a model trained on these captions has not seen.
"""

import inspect
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from data import CIFAR10_CLASSES
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATES = (
    "a photo of {a} {name}",
    "a picture of {a} {name}",
    "an image of {a} {name}",
    "a small photo of {a} {name}",
    "a colour photo of the {name}",
    "a blurry picture of {a} {name}",
    "this is {a} {name}",
    "the {name}",
    "{a} {name}",
    "{name}",
)
TOKENS = 16
"""Longest caption, with start and end."""


def prompts_for(pipe: DiffusionPipeline) -> list[str] | None:
    """A caption of each class, for a pipeline that takes prompts."""
    takes_prompts = "prompt" in inspect.signature(pipe.__call__).parameters
    return [captions(name)[0] for name in CIFAR10_CLASSES] if takes_prompts else None


def captions(name: str) -> list[str]:
    """One for each template."""
    article = "an" if name[0] in "aeiou" else "a"
    return [template.format(a=article, name=name) for template in TEMPLATES]


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding until every word is one piece; of equally frequent pairs the first in the alphabet.

    Source:
        arXiv 1508.07909, algorithm 1.
    """
    words = Counter(word for text in texts for word in text.split())
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while any(len(found) > 1 for found in pieces.values()):
        pairs = Counter()
        for word, found in pieces.items():
            for pair in pairwise(found):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(found, best) for word, found in pieces.items()}
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def make_tokenizer() -> CLIPTokenizer:
    """With the words of all captions."""
    merges = learn_merges([text for name in CIFAR10_CLASSES for text in captions(name)])
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def main(out: Annotated[Path, typer.Option(help="folder to write")]) -> None:
    """Write the tokenizer's files."""
    make_tokenizer().save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
