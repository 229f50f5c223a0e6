"""What a text VQ-DRAW can do: figures on held-out text, texts stage by stage, and texts of random codes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from tokenizers_vq import VQDrawForText

from .data import load_captioned_images
from .plots import write_atomically
from .processing import to_device

BATCH_SIZE = 128


@torch.inference_mode()
def evaluate_text_tokenizer(model: VQDrawForText, texts: Sequence[str]) -> dict[str, Any]:
    """Measure how well texts survive their codes, after every stage, and how well the codes are used.

    Returns:
        bits_per_byte: of every prefix of stages, over the bytes of the texts; spans past a text's end cost nothing, for they say nothing
        byte_accuracy: share of bytes that are right where they stand, after each stage
        exact_match: share of texts that come back whole, after each stage
        entropy_per_stage: nats a code; used_per_stage: options in use
        texts, bytes_per_text, texts_cut: how many were measured, their mean length, and how many were longer than the model reads
    """
    if not texts:
        raise ValueError("got no texts to evaluate")
    num_stages, num_spans = model.code_shape
    right, exact = torch.zeros(num_stages), torch.zeros(num_stages)
    histogram = torch.zeros(num_stages, model.codebook_size, dtype=torch.long)
    num_bytes = num_live = 0
    for first in range(0, len(texts), BATCH_SIZE):
        symbols = model.symbols(texts[first : first + BATCH_SIZE])
        codes = model.encode(symbols)
        live = model.live_spans(symbols)
        for stage, seen in enumerate(model.symbols_after_stages(codes)):
            is_text = symbols != model.end
            right[stage] += ((seen == symbols) & is_text).sum().cpu()
            exact[stage] += ((seen == symbols) | ~model.live(symbols)).all(dim=1).sum().cpu()
        by_stage = rearrange(codes, "b (n s) -> n b s", s=num_spans)[:, live].cpu()
        histogram.scatter_add_(1, by_stage, torch.ones_like(by_stage))
        num_bytes, num_live = num_bytes + int((symbols != model.end).sum()), num_live + int(live.sum())
    bits = math.log2(model.codebook_size) * num_live / max(1, num_bytes)
    shares = histogram / histogram.sum(dim=1, keepdim=True)
    return {
        "bits_per_byte": [bits * (stage + 1) for stage in range(num_stages)],
        "byte_accuracy": (right / max(1, num_bytes)).tolist(),
        "exact_match": (exact / len(texts)).tolist(),
        "entropy_per_stage": torch.special.entr(shares).sum(dim=1).tolist(),
        "used_per_stage": (histogram > 0).sum(dim=1).tolist(),
        "texts": len(texts),
        "bytes_per_text": num_bytes / len(texts),
        "texts_cut": sum(model.spans_of(text) > model.num_spans for text in texts),
    }


def text_sheet(model: VQDrawForText, texts: Sequence[str]) -> str:
    """Each text, and under it what its codes say after one stage, after two and so on."""
    stages = list(zip(*model.decode_stages(model.encode(list(texts))), strict=True))
    blocks = []
    for text, versions in zip(texts, stages, strict=True):
        lines = [f"{number:>4}  {version!r}" for number, version in enumerate(versions, start=1)]
        blocks.append("\n".join([f"text  {text!r}", *lines]))
    return "\n\n".join(blocks) + "\n"


def random_texts(model: VQDrawForText, num_texts: int, *, seed: int | None = None) -> str:
    """What codes drawn evenly say, a line each."""
    generator = torch.Generator()
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    codes = torch.randint(model.codebook_size, (num_texts, model.num_codes), generator=generator)
    return "".join(f"{text!r}\n" for text in model.decode(codes.to(model.device)))


def write_text_sheet(folder: str | Path, sources: list[str], out: str | Path, *, split: str, num_texts: int) -> None:
    """A file of texts stage by stage, and of as many texts of random codes.

    Args:
        sources: one data set, or the texts themselves.
    """
    is_data = len(sources) == 1 and (Path(sources[0]).exists() or " " not in sources[0])
    texts = sources
    if is_data:
        rows = load_captioned_images(sources[0], split=split, with_images=False, max_rows=num_texts)
        texts = rows["caption"][:]
    model = to_device(VQDrawForText.from_pretrained(folder)).eval()
    sheet = f"{text_sheet(model, texts)}\nrandom codes\n{random_texts(model, num_texts, seed=0)}"
    write_atomically(out, sheet.encode())
