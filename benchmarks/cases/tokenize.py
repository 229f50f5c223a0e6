"""Tokenize captioned images, against encoding alone: the overhead of reading, decoding and writing."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from datasets import Image as ImageFeature

from tok2img.data.streaming import DatasetRows
from tok2img.tokenization.map_function import TokenizeBatch
from tok2img.tokenization.processor import Tok2ImgProcessor
from tok2img.tokenization.shards import BATCH_SIZE, TokenizationJob, tokenize_shards
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tokenizers_vq import VQVAE, VQDrawForImages, VQDrawImageConfig, VQVAEConfig
from tokenizers_vq.images.processing import pixels_from_uint8

from ..harness import Case, Comparison
from .image_loading import encoded
from .vqdraw import perturbed

IMAGE_SIZE, FILE_SIZE = 32, 64
NUM_IMAGES, NUM_FILES = 10_000, 512


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare on a shard of 64-pixel JPEGs, encoded at 32: VQ-VAEs of two widths, and a VQ-DRAW with its default search."""
    sizes = VQDrawImageConfig(image_size=IMAGE_SIZE, num_stages=4, codebook_size=16, hidden_channels=16)
    widths = (8,) if tiny else (64, 128)
    models = {
        f"VQ-VAE of width {width}": VQVAE(VQVAEConfig(image_size=IMAGE_SIZE, hidden_channels=width)) for width in widths
    }
    for name, model in (models | {"VQ-DRAW": perturbed(VQDrawForImages(sizes))}).items():
        num = 4 if tiny else NUM_IMAGES // 10 if name == "VQ-DRAW" else NUM_IMAGES
        rows = captioned(num)
        text_tokenizer = SubwordTokenizer.train_bpe(rows["caption"][:], vocab_size=300)
        processor = Tok2ImgProcessor.build(model, text_tokenizer, text_length=8)
        work = TokenizeBatch(processor)
        read = work.read(rows[:], range(num), skip=False)
        batches = pixels_from_uint8(torch.from_numpy(read.pixels)).split(BATCH_SIZE)
        cases = [Case("tokenize", Tokenizing(rows, work)), Case("encode", Encoding(processor, batches))]
        yield Comparison(f"{num} images, {name}", cases, "encode")


def captioned(num: int) -> Dataset:
    """Create rows that repeat a few files."""
    files = encoded(min(num, NUM_FILES), FILE_SIZE, "JPEG")
    cells = [{"bytes": files[row % len(files)], "path": None} for row in range(num)]
    rows = Dataset.from_dict({"image": cells, "caption": [f"an image of number {row}" for row in range(num)]})
    return rows.cast_column("image", ImageFeature(decode=False))


class Tokenizing:
    """Tokenization of all rows, from files in memory to a shard on disk."""

    def __init__(self, rows: Dataset, work: TokenizeBatch):
        self.rows, self.work = rows, work

    def __call__(self) -> None:
        """Write one shard to a temporary folder."""
        with TemporaryDirectory() as folder:
            job = TokenizationJob(
                DatasetRows(self.rows), self.work, Path(folder), rows_per_shard=len(self.rows), on_error="raise"
            )
            tokenize_shards(job, [0])


class Encoding:
    """Encoding of the same batches, decoded beforehand."""

    def __init__(self, processor: Tok2ImgProcessor, batches: tuple[torch.Tensor, ...]):
        self.processor, self.batches = processor, batches

    def __call__(self) -> None:
        """Encode all batches."""
        for pixel_values in self.batches:
            self.processor.encode_pixels(pixel_values)
