"""Metrics of VQ text tokenizers on held-out texts."""

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
    """Measure the reconstruction accuracy of a text tokenizer after every stage, and its code usage.

    Args:
        model: The text tokenizer, in eval mode.
        texts: Held-out texts.

    Returns:
        A dictionary with these entries.

        - `bits_per_byte`: Bits of the first 1, 2, ... stages per byte of the texts. Spans after a
        text's end cost nothing,
          because they carry no information.
        - `byte_accuracy`: Fraction of bytes that are correct at their position, after each stage.
        - `exact_match`: Fraction of texts that are reconstructed exactly, after each stage.
        - `at_bits_per_byte`: Both, at budgets of 1, 2, 3 and 4 bits per byte: each text is decoded from as many of its
          first codes as the budget allows.
        - `entropy_per_stage`: Entropy of a code in nats.
        - `used_per_stage`: Number of options in use.
        - `texts`: Number of texts.
        - `bytes_per_text`: Mean length of the part that was encoded.
        - `num_truncated_texts`: Number of texts that were too long and therefore truncated.

    Raises:
        ValueError: For no texts.
    """
    return measure_text_tokenizer(model, texts)[0]


@torch.inference_mode()
def measure_text_tokenizer(model: TextSpanTokenizer, texts: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
    """Return the report of `evaluate_text_tokenizer`, and the counts `n k` of each option of each stage."""
    if not texts:
        raise ValueError("Expected at least one text, got no texts to evaluate.")
    by_stage, by_rate = AccuracyCounter(model.code_shape[0]), AccuracyCounter(len(BITS_PER_BYTE))
    histogram = torch.zeros(model.code_shape[0], model.codebook_size, dtype=torch.long)
    num_valid = 0
    for first in range(0, len(texts), BATCH_SIZE):
        symbols = model.texts_to_symbols(texts[first : first + BATCH_SIZE])
        codes, is_valid = model.encode(symbols), model.valid_spans(symbols)
        by_stage.add(model, symbols, model.decode_symbols_progressively(codes))
        masks = (prefix_mask(model, symbols, bits) for bits in BITS_PER_BYTE)
        by_rate.add(model, symbols, (model.decode_with_mask(codes, mask) for mask in masks))
        valid_codes = rearrange(codes, "b (n s) -> n b s", s=model.num_spans)[:, is_valid].cpu()
        histogram.scatter_add_(1, valid_codes, torch.ones_like(valid_codes))
        num_valid += int(is_valid.sum())
    bits = math.log2(model.codebook_size) * num_valid / max(1, by_stage.num_bytes)
    frequencies = histogram / histogram.sum(dim=1, keepdim=True)
    report = {
        "bits_per_byte": [bits * (stage + 1) for stage in range(model.code_shape[0])],
        **by_stage.accuracies(),
        "at_bits_per_byte": dict(zip(map(str, BITS_PER_BYTE), by_rate.accuracies_per_reading(), strict=True)),
        "entropy_per_stage": torch.special.entr(frequencies).sum(dim=1).tolist(),
        "used_per_stage": (histogram > 0).sum(dim=1).tolist(),
        "texts": len(texts),
        "bytes_per_text": by_stage.num_bytes / len(texts),
        "num_truncated_texts": sum(model.count_spans(text) > model.num_spans for text in texts),
    }
    return report, histogram


class AccuracyCounter:
    """Accumulates byte accuracy and exact matches over batches, for several readings of the same texts.

    Args:
        num_readings: Number of readings, e.g. one after each stage.
    """

    def __init__(self, num_readings: int):
        self.num_right_bytes, self.num_exact_texts = torch.zeros(num_readings), torch.zeros(num_readings)
        self.num_bytes = self.num_texts = 0

    def add(self, model: TextSpanTokenizer, symbols: Tensor, readings: Iterable[Tensor]) -> None:
        """Add a batch.

        Args:
            model: The text tokenizer.
            symbols: Symbols of the texts, `b t`.
            readings: Decoded symbols of each reading, `b t`.
        """
        is_text, is_padding = symbols != model.pad_symbol, ~model.valid_mask(symbols)
        for number, reading in enumerate(readings):
            self.num_right_bytes[number] += ((reading == symbols) & is_text).sum().cpu()
            self.num_exact_texts[number] += ((reading == symbols) | is_padding).all(dim=1).sum().cpu()
        self.num_bytes, self.num_texts = self.num_bytes + int(is_text.sum()), self.num_texts + len(symbols)

    def accuracies(self) -> dict[str, list[float]]:
        """Return byte accuracy and exact match, each as a list over readings."""
        return {
            "byte_accuracy": (self.num_right_bytes / max(1, self.num_bytes)).tolist(),
            "exact_match": (self.num_exact_texts / self.num_texts).tolist(),
        }

    def accuracies_per_reading(self) -> list[dict[str, float]]:
        """Return byte accuracy and exact match of each reading."""
        accuracies = self.accuracies()
        return [dict(zip(accuracies, values, strict=True)) for values in zip(*accuracies.values(), strict=True)]


def prefix_mask(model: TextSpanTokenizer, symbols: Tensor, bits_per_byte: float) -> Tensor:
    """Select as many of the first codes of each text as a budget of bits allows.

    Args:
        model: The text tokenizer.
        symbols: Symbols of the texts, `b t`.
        bits_per_byte: Budget for each byte of a text.

    Returns:
        A mask over the codes, stage by stage, `b (n s)` bool for n stages of s spans.
    """
    budget = (symbols != model.pad_symbol).sum(dim=1) * bits_per_byte / math.log2(model.codebook_size)
    is_valid = model.valid_spans(symbols).repeat(1, model.code_shape[0])
    return is_valid & (is_valid.cumsum(dim=1) <= budget[:, None])
