"""What a model of text can do: figures on held-out text, texts stage by stage, and texts of random codes."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenizers_vq import TextSpanTokenizer

from .data import load_captioned_images
from .processing import to_device
from .text_codes import load_text_model
from .whole_files import write_atomically

BATCH_SIZE = 128
BITS_PER_BYTE = (1, 2, 3, 4)


def evaluate_text_tokenizer(model: TextSpanTokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Measure how well texts survive their codes, after every stage, and how well the codes are used.

    Returns:
        bits_per_byte: of every prefix of stages, over the bytes of the texts; spans past a text's end cost nothing, for they say nothing
        byte_accuracy: share of bytes that are right where they stand, after each stage
        exact_match: share of texts that come back whole, after each stage
        at_bits_per_byte: both at 1, 2, 3 and 4 bits a byte at most, from as many of each text's first codes as these pay for
        entropy_per_stage: nats a code; used_per_stage: options in use
        texts, bytes_per_text, texts_cut: how many were measured, their mean length, and how many were longer than the model reads
    """
    return measure_text_tokenizer(model, texts)[0]


@torch.inference_mode()
def measure_text_tokenizer(model: TextSpanTokenizer, texts: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
    """What `evaluate_text_tokenizer` returns, and how often each option of each stage was used, `n k`."""
    if not texts:
        raise ValueError("got no texts to evaluate")
    by_stage, by_rate = Tally(model.code_shape[0]), Tally(len(BITS_PER_BYTE))
    histogram = torch.zeros(model.code_shape[0], model.codebook_size, dtype=torch.long)
    num_live = 0
    for first in range(0, len(texts), BATCH_SIZE):
        symbols = model.symbols(texts[first : first + BATCH_SIZE])
        codes, live = model.encode(symbols), model.live_spans(symbols)
        by_stage.add(model, symbols, model.symbols_after_stages(codes))
        budgets = (first_codes(model, symbols, bits) for bits in BITS_PER_BYTE)
        by_rate.add(model, symbols, (model.symbols_given(codes, given) for given in budgets))
        live_codes = rearrange(codes, "b (n s) -> n b s", s=model.num_spans)[:, live].cpu()
        histogram.scatter_add_(1, live_codes, torch.ones_like(live_codes))
        num_live += int(live.sum())
    bits = math.log2(model.codebook_size) * num_live / max(1, by_stage.num_bytes)
    shares = histogram / histogram.sum(dim=1, keepdim=True)
    report = {
        "bits_per_byte": [bits * (stage + 1) for stage in range(model.code_shape[0])],
        **by_stage.figures(),
        "at_bits_per_byte": dict(zip(map(str, BITS_PER_BYTE), by_rate.rows(), strict=True)),
        "entropy_per_stage": torch.special.entr(shares).sum(dim=1).tolist(),
        "used_per_stage": (histogram > 0).sum(dim=1).tolist(),
        "texts": len(texts),
        "bytes_per_text": by_stage.num_bytes / len(texts),
        "texts_cut": sum(model.spans_of(text) > model.num_spans for text in texts),
    }
    return report, histogram


class Tally:
    """Bytes that are right where they stand, and texts that are right as a whole, in each of several readings."""

    def __init__(self, num_readings: int):
        self.right, self.exact = torch.zeros(num_readings), torch.zeros(num_readings)
        self.num_bytes = self.num_texts = 0

    def add(self, model: TextSpanTokenizer, symbols: Tensor, readings: Iterable[Tensor]) -> None:
        """Compare symbols `b t` with what each reading says, `b t`."""
        is_text, is_free = symbols != model.end, ~model.live(symbols)
        for number, seen in enumerate(readings):
            self.right[number] += ((seen == symbols) & is_text).sum().cpu()
            self.exact[number] += ((seen == symbols) | is_free).all(dim=1).sum().cpu()
        self.num_bytes, self.num_texts = self.num_bytes + int(is_text.sum()), self.num_texts + len(symbols)

    def figures(self) -> dict[str, list[float]]:
        """Both shares, a list over readings each."""
        return {
            "byte_accuracy": (self.right / max(1, self.num_bytes)).tolist(),
            "exact_match": (self.exact / self.num_texts).tolist(),
        }

    def rows(self) -> list[dict[str, float]]:
        """Both shares, reading by reading."""
        figures = self.figures()
        return [dict(zip(figures, row, strict=True)) for row in zip(*figures.values(), strict=True)]


def first_codes(model: TextSpanTokenizer, symbols: Tensor, bits_per_byte: float) -> Tensor:
    """As many of the first codes of each text `b t` as so many bits for each of its bytes pay for: booleans `b (n s)`."""
    budget = (symbols != model.end).sum(dim=1) * bits_per_byte / math.log2(model.codebook_size)
    live = model.live_spans(symbols).repeat(1, model.code_shape[0])
    return live & (live.cumsum(dim=1) <= budget[:, None])


def text_sheet(model: TextSpanTokenizer, texts: Sequence[str]) -> str:
    """Each text, and under it what its codes say after one stage, after two and so on."""
    stages = list(zip(*model.decode_stages(model.encode(list(texts))), strict=True))
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


def names_data(source: str) -> bool:
    """Whether this is the name of a data set, in a folder or on the hub, and not a text itself."""
    return source == "shapes" or os.path.exists(source) or ("/" in source and " " not in source)


def write_text_sheet(folder: str | Path, sources: list[str], out: str | Path, *, split: str, num_texts: int) -> None:
    """A file of texts stage by stage, and of as many texts of random codes.

    Args:
        sources: one data set (see `names_data`), or the texts themselves.

    Raises:
        ValueError: for an `out` that is named as something else than a text, and for data that cannot be read.
    """
    if Path(out).suffix not in ("", ".txt"):
        raise ValueError(f"{out}: a sheet of texts is a .txt file")
    texts = sources
    if len(sources) == 1 and names_data(sources[0]):
        rows = load_captioned_images(sources[0], split=split, with_images=False, max_rows=num_texts)
        texts = rows["caption"][:]
    model = to_device(load_text_model(folder))
    sheet = f"{text_sheet(model, texts)}\nrandom codes\n{random_texts(model, num_texts, seed=0)}"
    write_atomically(out, sheet.encode())
