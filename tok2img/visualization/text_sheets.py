"""Sheets of reconstructed and random texts, as text files."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from tokenizers_vq import TextSpanTokenizer

from ..atomic_io import write_atomically
from ..data.loading import load_captioned_images
from ..device import to_device
from ..tokenization.span_text_tokenizer import load_text_model


def render_text_stages(model: TextSpanTokenizer, texts: Sequence[str]) -> str:
    """Render each text, and below it the text that is decoded after 1, 2, ... stages."""
    stages = list(zip(*model.decode_progressively(model.encode(list(texts))), strict=True))
    blocks = []
    for text, versions in zip(texts, stages, strict=True):
        lines = [f"{number:>4}  {version!r}" for number, version in enumerate(versions, start=1)]
        blocks.append("\n".join([f"text  {text!r}", *lines]))
    return "\n\n".join(blocks) + "\n"


def sample_random_texts(model: TextSpanTokenizer, num_texts: int, *, seed: int | None = None) -> str:
    """Decode uniformly random codes, one line per text.

    Args:
        model: The text tokenizer.
        num_texts: Number of texts.
        seed: Seed; None: random.
    """
    generator = torch.Generator()
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    codes = torch.randint(model.codebook_size, (num_texts, model.num_codes), generator=generator)
    return "".join(f"{text!r}\n" for text in model.decode(codes.to(model.device)))


def is_dataset_name(source: str) -> bool:
    """Return True if `source` is the name of a data set, on disk or on the hub, rather than a text."""
    return source == "shapes" or os.path.exists(source) or ("/" in source and " " not in source)


def save_text_sheet(folder: str | Path, sources: list[str], out: str | Path, *, split: str, num_texts: int) -> None:
    """Save texts with their reconstructions after every stage, and as many texts of random codes.

    Args:
        folder: Folder of a VQ text tokenizer.
        sources: One data set (see `is_dataset_name`), or the texts themselves.
        out: Text file to write.
        split: Split of the data set.
        num_texts: Number of texts to take from a data set, and of random texts.

    Raises:
        ValueError: If the suffix of `out` is not that of a text file, or the data cannot be read.
    """
    if Path(out).suffix not in ("", ".txt"):
        raise ValueError(f"Expected a .txt file for a sheet of texts, got {out}.")
    texts = sources
    if len(sources) == 1 and is_dataset_name(sources[0]):
        rows = load_captioned_images(sources[0], split=split, with_images=False, max_samples=num_texts)
        texts = rows["caption"][:]
    model = to_device(load_text_model(folder))
    sheet = f"{render_text_stages(model, texts)}\nrandom codes\n{sample_random_texts(model, num_texts, seed=0)}"
    write_atomically(out, sheet.encode())
