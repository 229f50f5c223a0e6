"""Torch data sets that a tokenizer trains on: images, captions, and streams that repeat."""

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
DECODE_BATCH_SIZE = 256


def is_stream(dataset: Any) -> bool:
    """Return True if a data set has no length: its examples only come one after another."""
    return not hasattr(dataset, "__len__")


class RepeatDataset(IterableDataset[Any]):
    """A stream that repeats for ever, each time as its next epoch.

    transformers counts the steps of an epoch by the length of a data set. With a stream that ends it would
    resume at the wrong example after the first epoch.

    Args:
        rows: Iterable of examples. Its `set_epoch(epoch)` is called before each repetition, if it has one.
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
            if row is None:  # an empty stream must not loop for ever
                return


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images of a data set as `pixel_values` `c h w` for an image tokenizer.

    A data set whose images fit into `MAX_DECODED_BYTES` is decoded once, before training, so that an image
    that does not decode is found at the start. Images of a larger set are decoded when they are asked for.

    Args:
        dataset: Data set with a column of images.
        image_tokenizer: Tokenizer whose image size and channels the images get.
        image_column: Name of the column.
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
        """Return images as uint8 pixels, `b c h w`."""
        return load_uint8(self.dataset[list(rows)][self.image_column], self.image_tokenizer, rows=rows)

    def _decode(self) -> Tensor:
        """Return all images as uint8 pixels, `b c h w`."""
        decoded = []
        with tqdm(total=len(self), desc="decode", unit=" images") as bar:
            for first in range(0, len(self), DECODE_BATCH_SIZE):
                decoded.append(self._load(range(first, min(first + DECODE_BATCH_SIZE, len(self)))))
                bar.update(len(decoded[-1]))
        return torch.cat(decoded)


class TextDataset(Dataset[dict[str, Tensor]]):
    """Captions of a data set as `symbols` `t` for a text tokenizer, read once.

    Args:
        dataset: Data set with a column of captions.
        text_model: Tokenizer that turns text into symbols.
        caption_column: Name of the column.
    """

    def __init__(self, dataset: Any, text_model: TextSpanTokenizer, caption_column: str = "caption"):
        self.symbols = text_model.texts_to_symbols(dataset[caption_column][:]).short()

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"symbols": self.symbols[row].long()}
