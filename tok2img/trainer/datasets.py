"""Torch data sets of images and texts."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from tokenizers_vq import DiscreteTokenizer, TextSpanTokenizer
from tokenizers_vq.images.processing import pixels_from_uint8

from ..data.images import load_uint8

MAX_DECODED_BYTES = 2**31


def is_stream(dataset: Any) -> bool:
    """Whether rows only come one after another."""
    return not hasattr(dataset, "__len__")


class RepeatDataset(IterableDataset[Any]):
    """A stream over and over, each time as its next epoch.

    transformers counts the steps of an epoch by the rows of a data set; of a stream it would go on from the wrong place after the first.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            row = None
            for row in self.rows:
                yield row
            if row is None:
                return


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Rows of a data set as `pixel_values` `c h w` for a tokenizer.

    What fits into `MAX_DECODED_BYTES` is decoded once, before training, so that an image that does not decode is found at the start;
    rows of a larger set are decoded when they are asked for.
    """

    def __init__(self, dataset: Any, image_tokenizer: DiscreteTokenizer, image_column: str = "image"):
        self.dataset, self.image_tokenizer, self.image_column = dataset, image_tokenizer, image_column
        self.decoded: Tensor | None = None
        self.decoded = self._decode() if len(dataset) * self[0]["pixel_values"].numel() <= MAX_DECODED_BYTES else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if self.decoded is not None:
            return {"pixel_values": pixels_from_uint8(self.decoded[row])}
        return {"pixel_values": pixels_from_uint8(self._load([row])[0])}

    def _load(self, rows: Sequence[int]) -> Tensor:
        """Images as bytes, `b c h w`."""
        return load_uint8(self.dataset[list(rows)][self.image_column], self.image_tokenizer, rows=rows)

    def _decode(self) -> Tensor:
        """All images as bytes, `n c h w`."""
        runs = [range(first, min(first + 256, len(self))) for first in range(0, len(self), 256)]
        with tqdm(total=len(self), desc="decode", unit=" images") as bar:
            decoded = []
            for rows in runs:
                decoded.append(self._load(rows))
                bar.update(len(rows))
        return torch.cat(decoded)


class TextDataset(Dataset[dict[str, Tensor]]):
    """Captions of a data set as `symbols` `t` for a text tokenizer, read once."""

    def __init__(self, dataset: Any, text_model: TextSpanTokenizer, caption_column: str = "caption"):
        self.symbols = text_model.texts_to_symbols(dataset[caption_column][:]).short()

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"symbols": self.symbols[row].long()}
