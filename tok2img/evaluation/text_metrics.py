"""What a model of text can do: figures on held-out text, texts stage by stage, and texts of random codes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenizers_vq import TextSpanTokenizer

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
    by_stage, by_rate = AccuracyCounter(model.code_shape[0]), AccuracyCounter(len(BITS_PER_BYTE))
    histogram = torch.zeros(model.code_shape[0], model.codebook_size, dtype=torch.long)
    num_live = 0
    for first in range(0, len(texts), BATCH_SIZE):
        symbols = model.texts_to_symbols(texts[first : first + BATCH_SIZE])
        codes, live = model.encode(symbols), model.valid_spans(symbols)
        by_stage.add(model, symbols, model.decode_symbols_progressively(codes))
        budgets = (prefix_mask(model, symbols, bits) for bits in BITS_PER_BYTE)
        by_rate.add(model, symbols, (model.decode_with_mask(codes, given) for given in budgets))
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
        "texts_cut": sum(model.count_spans(text) > model.num_spans for text in texts),
    }
    return report, histogram


class AccuracyCounter:
    """Bytes that are right where they stand, and texts that are right as a whole, in each of several readings."""

    def __init__(self, num_readings: int):
        self.right, self.exact = torch.zeros(num_readings), torch.zeros(num_readings)
        self.num_bytes = self.num_texts = 0

    def add(self, model: TextSpanTokenizer, symbols: Tensor, readings: Iterable[Tensor]) -> None:
        """Compare symbols `b t` with what each reading says, `b t`."""
        is_text, is_free = symbols != model.pad_symbol, ~model.valid_mask(symbols)
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


def prefix_mask(model: TextSpanTokenizer, symbols: Tensor, bits_per_byte: float) -> Tensor:
    """As many of the first codes of each text `b t` as so many bits for each of its bytes pay for: booleans `b (n s)`."""
    budget = (symbols != model.pad_symbol).sum(dim=1) * bits_per_byte / math.log2(model.codebook_size)
    live = model.valid_spans(symbols).repeat(1, model.code_shape[0])
    return live & (live.cumsum(dim=1) <= budget[:, None])
