"""Measure how well a linear classifier predicts the class of an image from a tokenizer's codes.

    python training/experiments/linear_probe.py TOKENIZER DATA [ROWS] [BEAM]

TOKENIZER is a folder, or a checkpoint of the original VQ-DRAW. DATA has columns `image` and
`label`, and splits train and
test. ROWS limits the rows of each split (default 20,000); BEAM is the beam size of VQ-DRAW (default 1).
"""

import sys
from typing import Any

import torch
from tqdm import tqdm

from tok2img.data.images import load_pixels
from tok2img.data.loading import load_captioned_images
from tok2img.evaluation.linear_probe import linear_probe
from tok2img.recipes.build_processor import set_encode_search
from tok2img.recipes.build_tokenizer import load_trained
from tokenizers_vq import DiscreteTokenizer


def codes_and_labels(
    tokenizer: DiscreteTokenizer, data: str, split: str, max_samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `b n` and labels `b` of the first rows of a split."""
    rows = load_captioned_images(data, split=split, with_captions=False, max_samples=max_samples)
    codes = [
        tokenizer.encode_with_search(load_pixels(rows[first : first + 250]["image"], tokenizer))
        for first in tqdm(range(0, len(rows), 250), desc=split)
    ]
    labels: Any = rows["label"][:]
    return torch.cat(codes), torch.tensor(labels)


def main(path: str, data: str, max_samples: int = 20_000, beam_size: int = 1) -> float:
    """Print and return the accuracy on the test split."""
    tokenizer = load_trained(path)
    if hasattr(tokenizer.config, "beam_size"):
        set_encode_search(tokenizer, beam_size=beam_size)
    train, test = (codes_and_labels(tokenizer, data, split, max_samples) for split in ("train", "test"))
    accuracy = linear_probe(*train, *test, codebook_size=tokenizer.codebook_size)
    print(f"{accuracy:.2%} of {len(test[1])} test rows, from the codes of {len(train[1])} training rows")
    return accuracy


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
