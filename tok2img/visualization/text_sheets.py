"""Write sheets of reconstructed and random texts."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from tokenizers_vq import TextSpanTokenizer

from ..atomic_io import write_atomically
from ..data.loading import load_captioned_images
from ..device import to_device
from ..tokenization.span_text_tokenizer import load_text_model


def text_sheet(model: TextSpanTokenizer, texts: Sequence[str]) -> str:
    """Each text, and under it what its codes say after one stage, after two and so on."""
    stages = list(zip(*model.decode_progressively(model.encode(list(texts))), strict=True))
    blocks = []
    for text, versions in zip(texts, stages, strict=True):
        lines = [f"{number:>4}  {version!r}" for number, version in enumerate(versions, start=1)]
        blocks.append("\n".join([f"text  {text!r}", *lines]))
    return "\n\n".join(blocks) + "\n"


def random_texts(model: TextSpanTokenizer, num_texts: int, *, seed: int | None = None) -> str:
    """What codes drawn evenly say, a line each."""
    generator = torch.Generator()
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    codes = torch.randint(model.codebook_size, (num_texts, model.num_codes), generator=generator)
    return "".join(f"{text!r}\n" for text in model.decode(codes.to(model.device)))


def is_dataset_name(source: str) -> bool:
    """Whether this is the name of a data set, in a folder or on the hub, and not a text itself."""
    return source == "shapes" or os.path.exists(source) or ("/" in source and " " not in source)


def write_text_sheet(folder: str | Path, sources: list[str], out: str | Path, *, split: str, num_texts: int) -> None:
    """A file of texts stage by stage, and of as many texts of random codes.

    Args:
        sources: one data set (see `is_dataset_name`), or the texts themselves.

    Raises:
        ValueError: for an `out` that is named as something else than a text, and for data that cannot be read.
    """
    if Path(out).suffix not in ("", ".txt"):
        raise ValueError(f"{out}: a sheet of texts is a .txt file")
    texts = sources
    if len(sources) == 1 and is_dataset_name(sources[0]):
        rows = load_captioned_images(sources[0], split=split, with_images=False, max_samples=num_texts)
        texts = rows["caption"][:]
    model = to_device(load_text_model(folder))
    sheet = f"{text_sheet(model, texts)}\nrandom codes\n{random_texts(model, num_texts, seed=0)}"
    write_atomically(out, sheet.encode())
