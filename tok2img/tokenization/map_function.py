"""The function that tokenizes a batch of captioned images, for `datasets.map` and for `save_tokens`."""

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
    """Rows that were read and decoded, and the rows that could not be.

    Attributes:
        text_ids: Text ids of the readable rows, `b t`.
        pixels: Their images as uint8, `b c h w`.
        num_truncated: Number of captions that are longer than the layout's text length.
        skipped: Number and reason of each other row.
    """

    text_ids: np.ndarray
    pixels: np.ndarray
    num_truncated: int
    skipped: list[tuple[int, str]]


class TokenizeBatch:
    """Tokenizes a batch for `dataset.map(..., batched=True)`: `text_ids` `b t` and `image_codes` `b n`.

    It pickles to what the tokens depend on and nothing else. The cache of `datasets`, which hashes the pickle, is thus
    found again from another folder, process or mode of the same weights, and only then.

    Args:
        processor: Both tokenizers and the layout.
        image_column: Column of images.
        caption_column: Column of captions.

    Example:
        >>> from tok2img import SubwordTokenizer, Tok2ImgProcessor, TokenizeBatch, shapes_dataset
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> config = VQVAEConfig(image_size=8, hidden_channels=8, num_decoder_blocks=1, codebook_size=4, code_dim=2)
        >>> model = VQVAE(config)
        >>> rows = shapes_dataset("train", 2)
        >>> text_tokenizer = SubwordTokenizer.train_bpe(rows["caption"], vocab_size=260)
        >>> processor = Tok2ImgProcessor.build(model, text_tokenizer, text_length=8)
        >>> tokens = TokenizeBatch(processor)({"image": rows["image"], "caption": rows["caption"]})
        >>> tokens["text_ids"].shape, tokens["image_codes"].shape
        ((2, 8), (2, 4))
    """

    def __init__(self, processor: Tok2ImgProcessor, *, image_column: str = "image", caption_column: str = "caption"):
        self.processor, self.image_column, self.caption_column = processor, image_column, caption_column

    def __call__(self, batch: dict[str, list[Any]], rows: list[int] | None = None) -> dict[str, np.ndarray]:
        """Tokenize a batch of columns; ValueError with the row's number for one that cannot be read."""
        numbers = range(len(batch[self.caption_column])) if rows is None else rows
        decoded = self.read(batch, numbers, skip=False)
        return {"text_ids": decoded.text_ids, "image_codes": self.image_codes(decoded)}

    def read(self, batch: dict[str, list[Any]], rows: Sequence[int], *, skip: bool) -> DecodedBatch:
        """Tokenize the captions and decode the images of a batch.

        Args:
            batch: Columns of images and captions.
            rows: Row numbers, for errors and for `DecodedBatch.skipped`.
            skip: Leave out rows that cannot be read instead of raising.

        Raises:
            ValueError: If a row cannot be read and `skip` is False.
        """
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
        # Only a caption that fills its row can have been truncated, so only these are counted in full.
        is_full = (text_ids[:, -1] != layout.pad_id).tolist()
        num_truncated = self.processor.count_truncated(list(compress(captions, is_full)))
        pixels = resize_to_uint8(images, self.processor.image_tokenizer).numpy()
        return DecodedBatch(text_ids.numpy().astype(layout.text_dtype), pixels, num_truncated, skipped)

    def image_codes(self, batch: DecodedBatch) -> np.ndarray:
        """Encode the images of a batch: pixels `b c h w` to codes `b n`."""
        layout = self.processor.layout
        if not len(batch.pixels):
            return np.empty((0, layout.num_codes), dtype=layout.code_dtype)
        # Moved as bytes: a quarter of the traffic to an accelerator.
        pixels = torch.from_numpy(batch.pixels).to(self.processor.image_tokenizer.device)
        return self.processor.encode_pixels(pixels_from_uint8(pixels)).numpy().astype(layout.code_dtype)

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
        return _unpickle, (model_type, settings, weights, text, sizes, columns)


def _unpickle(
    model_type: str,
    settings: dict[str, Any],
    weights: bytes,
    text: TextTokenizer,
    sizes: dict[str, int],
    columns: dict[str, str],
) -> TokenizeBatch:
    """Rebuild a `TokenizeBatch` from its pickle."""
    if os.getpid() != MAIN_PROCESS:
        # A fork inherits torch's thread pool without its threads: the first parallel loop would wait forever.
        torch.set_num_threads(1)
    image_tokenizer = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    image_tokenizer.load_state_dict(load(weights))
    return TokenizeBatch(Tok2ImgProcessor.build(image_tokenizer, text, **sizes), **columns)


def token_features(layout: SequenceLayout) -> Features:
    """Return the columns of a tokenized data set: fixed lengths, smallest unsigned types."""
    return Features(
        {
            "text_ids": List(Value(layout.text_dtype.name), length=layout.text_length),
            "image_codes": List(Value(layout.code_dtype.name), length=layout.num_codes),
        }
    )


def token_table(layout: SequenceLayout, text_ids: np.ndarray, image_codes: np.ndarray) -> Dataset:
    """Build a tokenized data set from text ids `b t` and image codes `b n` without a copy.

    `Dataset.from_dict` would convert the arrays number by number.
    """
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
    """Tokenize a data set by `map`, streaming or not.

    Args:
        dataset: A data set with images and captions.
        processor: Both tokenizers and the layout.
        image_column: Column of images (paths, bytes, PIL images, or undecoded `datasets.Image`).
        caption_column: Column of captions.
        batch_size: Number of rows that are tokenized at a time.
        num_proc: Number of processes; ignored for a streaming data set.

    Returns:
        The columns `text_ids` `t` and `image_codes` `n`, and no others.

    Raises:
        ValueError: If a column is missing, the data set is empty, or a row cannot be read.

    Example:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from tok2img import Tok2ImgProcessor
        >>> from tok2img.tokenization.text_tokenizer import SubwordTokenizer
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> config = VQVAEConfig(image_size=8, hidden_channels=8, code_dim=4, codebook_size=8)
        >>> text_tokenizer = SubwordTokenizer.train_bpe(["a red square"], vocab_size=256)
        >>> processor = Tok2ImgProcessor.build(VQVAE(config), text_tokenizer, text_length=6)
        >>> rows = Dataset.from_dict({"image": [Image.new("RGB", (8, 8), "red")], "caption": ["red"]})
        >>> tokens = tokenize_dataset(rows, processor)
        >>> {name: len(tokens[0][name]) for name in tokens.column_names}
        {'text_ids': 6, 'image_codes': 4}
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
