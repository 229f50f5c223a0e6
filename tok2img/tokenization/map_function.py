"""Captioned images -> compact columns of tokens, for `datasets.map`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from safetensors.torch import load, save
from transformers import AutoConfig, AutoModel

from tokenizers_vq.base import own_fields
from tokenizers_vq.images.processing import pixels_from_uint8
from tokenizers_vq.loading import first_line

from ..data.images import load_images, resize_to_uint8
from .layout import SequenceLayout
from .processor import Tok2ImgProcessor
from .text_tokenizer import TextTokenizer, check_text

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)
MAIN_PROCESS = os.getpid()


@dataclass
class DecodedBatch:
    """Rows that could be read, and those that could not.

    Attributes:
        text_ids: `b t` of the rows; levels: `b c h w` uint8; count_truncated: captions that are longer than there is room for.
        skipped: numbers and reasons of the other rows.
    """

    text_ids: np.ndarray
    levels: np.ndarray
    count_truncated: int
    skipped: list[tuple[int, str]]


class TokenizeBatch:
    """What `dataset.map(..., batched=True)` calls: captions and images -> `text_ids` `b t` and `image_codes` `b n`.

    It pickles to what the tokens depend on and nothing else, so that the cache of `datasets` is found again from another folder,
    process or mode of the same weights, and only then.
    """

    def __init__(self, processor: Tok2ImgProcessor, *, image_column: str = "image", caption_column: str = "caption"):
        self.processor, self.image_column, self.caption_column = processor, image_column, caption_column

    def __call__(self, batch: dict[str, list[Any]], rows: list[int] | None = None) -> dict[str, np.ndarray]:
        """A batch of rows -> their tokens. ValueError for a caption or image that is none, with its row."""
        numbers = range(len(batch[self.caption_column])) if rows is None else rows
        read = self.read(batch, numbers, skip=False)
        return {"text_ids": read.text_ids, "image_codes": self.image_codes(read)}

    def read(self, batch: dict[str, list[Any]], rows: Sequence[int], *, skip: bool) -> DecodedBatch:
        """Decode a batch; a row that cannot be read is skipped, or else a ValueError with its number."""
        numbers, captions, images, skipped = [], [], [], []
        for row, caption, image in zip(rows, batch[self.caption_column], batch[self.image_column], strict=True):
            try:
                check_text(caption, row)
                images += load_images([image], rows=[row], fit_for=self.processor.image_tokenizer)
            except ValueError as error:
                if not skip:
                    raise
                skipped.append((row, first_line(error).removeprefix(f"row {row}: ")))
            else:
                numbers.append(row)
                captions.append(caption)
        layout = self.processor.layout
        if not images:
            return DecodedBatch(np.empty((0, layout.text_length), layout.text_dtype), np.empty(0, np.uint8), 0, skipped)
        text_ids = self.processor.encode_text(captions, rows=numbers)
        is_full = (text_ids[:, -1] != layout.pad_id).tolist()  # a caption that is cut leaves no room
        count_truncated = self.processor.count_truncated(list(compress(captions, is_full)))
        levels = resize_to_uint8(images, self.processor.image_tokenizer).numpy()
        return DecodedBatch(text_ids.numpy().astype(layout.text_dtype), levels, count_truncated, skipped)

    def image_codes(self, batch: DecodedBatch) -> np.ndarray:
        """Codes `b n` of what was read."""
        layout = self.processor.layout
        if not len(batch.levels):
            return np.empty((0, layout.num_codes), dtype=layout.code_dtype)
        levels = torch.from_numpy(batch.levels).to(self.processor.image_tokenizer.device)
        return self.processor.encode_pixels(pixels_from_uint8(levels)).numpy().astype(layout.code_dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        tokenizer = self.processor.image_tokenizer
        weights = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tokenizer.state_dict().items())}
        )
        settings = {name: getattr(tokenizer.config, name) for name in sorted(own_fields(type(tokenizer.config)))}
        text = self.processor.text_tokenizer
        columns = {"image_column": self.image_column, "caption_column": self.caption_column}
        model_type = tokenizer.config.model_type
        layout = self.processor.layout
        sizes = {"text_length": layout.text_length, "text_vocab_size": layout.text_vocab_size}
        return rebuild, (model_type, settings, weights, text, sizes, columns)


def rebuild(
    model_type: str,
    settings: dict[str, Any],
    weights: bytes,
    text: TextTokenizer,
    sizes: dict[str, int],
    columns: dict[str, str],
) -> TokenizeBatch:
    """Make a `TokenizeBatch` again from its pickle."""
    if os.getpid() != MAIN_PROCESS:
        # A fork inherits torch's thread pool without its threads: the first parallel loop would wait for ever.
        torch.set_num_threads(1)
    image_tokenizer = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    image_tokenizer.load_state_dict(load(weights))
    return TokenizeBatch(Tok2ImgProcessor.build(image_tokenizer, text, **sizes), **columns)


def token_features(layout: SequenceLayout) -> Features:
    """Columns of a tokenized data set: fixed lengths, smallest types."""
    return Features(
        {
            "text_ids": List(Value(layout.text_dtype.name), length=layout.text_length),
            "image_codes": List(Value(layout.code_dtype.name), length=layout.num_codes),
        }
    )


def token_table(layout: SequenceLayout, text_ids: np.ndarray, image_codes: np.ndarray) -> Dataset:
    """A tokenized data set of `n t` and `n c`; `Dataset.from_dict` would take them apart number by number."""
    schema = token_features(layout).arrow_schema
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), field.type.value_type), type=field.type)
        for rows, field in zip((text_ids, image_codes), schema, strict=True)
    ]
    return Dataset(pa.Table.from_arrays(columns, schema=schema))


def tokenize_dataset(
    dataset: AnyDataset,
    processor: Tok2ImgProcessor,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    batch_size: int = 256,
    num_proc: int | None = None,
) -> AnyDataset:
    """Tokenize a data set, streaming or not; the result holds `text_ids` `t` and `image_codes` `n` and nothing else.

    Raises:
        ValueError: for a column that is not there, an empty data set, and a caption or image that is none, with its row.
    """
    columns = dataset.column_names or []
    for column in (image_column, caption_column):
        if columns and column not in columns:
            raise ValueError(f"the data set has no column {column!r}; it has {', '.join(columns)}")
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError("the data set is empty")
    work = TokenizeBatch(processor, image_column=image_column, caption_column=caption_column)
    arguments = {"batched": True, "with_indices": True, "batch_size": batch_size, "remove_columns": columns}
    features = token_features(processor.layout)
    if isinstance(dataset, IterableDataset):
        return dataset.map(work, features=features, **arguments)
    return dataset.map(work, features=features, num_proc=num_proc, desc="tokenize", **arguments)
