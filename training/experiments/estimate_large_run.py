"""Estimate the cost of a large run from rates measured here: the figures of docs/scale.md.

    python training/experiments/estimate_large_run.py

Counts the floating-point operations of an encoder and of a training step of a prior, and measures their CPU time on one
core. The operations for a billion images are then divided by the throughput that a GPU is assumed to reach.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tok2img.data.images import load_pixels
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior, shape_settings
from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.map_function import token_features
from tokenizers_vq import VQVAE, DiscreteTokenizer, VQDrawForImages, VQDrawImageConfig, VQVAEConfig

ROUNDS = 3
GPU_FLOPS = 0.4 * 989e12  # assumed: 40 % of the bfloat16 peak of an H100
DOLLARS_PER_HOUR = 2.5  # assumed, for such a GPU
DOLLARS_PER_CORE_HOUR = 0.04  # assumed
DOLLARS_PER_TB_MONTH = 20  # assumed, object storage
IMAGE_BYTES = 30_000  # assumed, for a JPEG of 256 pixels


@dataclass
class Rate:
    """Cost of one item.

    Attributes:
        flops: Floating-point operations.
        seconds: Seconds of one core.
    """

    flops: float
    seconds: float

    @property
    def per_second(self) -> float:
        """Number of items per second and core."""
        return 1 / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.flops:.3g} FLOP, {self.per_second:.4g} per second and core, {self.flops / self.seconds:.3g} FLOP/s"
        )


def rate_of(work: Callable[[], object], num_items: int) -> Rate:
    """Measure `work`, which processes `num_items` items, and return the rate of one.

    The fastest of `ROUNDS` runs counts.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return Rate(counter.get_total_flops() / num_items, min(seconds) / num_items)


def rate_of_encoding(tokenizer: DiscreteTokenizer, num_images: int) -> Rate:
    """Measure the encoding of an image."""
    side, channels = tokenizer.config.image_size, tokenizer.config.num_channels
    images = torch.rand(num_images, channels, side, side)
    return rate_of(lambda: tokenizer.eval().encode(images), num_images)


def rate_of_training(layout: SequenceLayout, *, depth: int, batch_size: int) -> Rate:
    """Measure a training step of a prior per token: forward, backward and AdamW."""
    model = PriorWithLoss(build_prior(layout, depth=depth), layout)
    optimizer = torch.optim.AdamW(model.parameters())
    text_ids = torch.randint(layout.text_vocab_size, (batch_size, layout.text_length))
    codes = torch.randint(layout.codebook_size, (batch_size, layout.num_codes))

    def step() -> None:
        model(text_ids, codes).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rate_of(step, batch_size * layout.sequence_length)


def rate_of_reading(tokenizer: DiscreteTokenizer, num_images: int) -> Rate:
    """Measure the loading of a JPEG of 320 x 256 pixels for a tokenizer."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((320, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    images = [{"bytes": file.getvalue(), "path": None}] * num_images
    return rate_of(lambda: load_pixels(images, tokenizer), num_images)


def token_bytes(layout: SequenceLayout, num_rows: int = 10_000) -> float:
    """Return the bytes of an image's tokens in a shard, in the worst case: all tokens equally likely."""
    generator = np.random.default_rng(0)
    text = generator.integers(0, layout.text_vocab_size, (num_rows, layout.text_length), dtype=layout.text_dtype)
    codes = generator.integers(0, layout.codebook_size, (num_rows, layout.num_codes), dtype=layout.code_dtype)
    rows = Dataset.from_dict({"text_ids": text, "image_codes": codes}, features=token_features(layout))
    with TemporaryDirectory() as folder:
        rows.to_parquet(f"{folder}/shard.parquet")
        return Path(folder, "shard.parquet").stat().st_size / num_rows


def num_parameters(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def plan(
    *, num_images: float, reading: Rate, encoding: Rate, flops_per_token: float, tokens: int, row_bytes: float
) -> dict[str, str]:
    """Estimate storage, hours and dollars for each stage of a run."""
    core_hours = num_images * reading.seconds / 3600
    on_cores = num_images * encoding.seconds / 3600
    encode_hours = num_images * encoding.flops / GPU_FLOPS / 3600
    train_hours = num_images * tokens * flops_per_token / GPU_FLOPS / 3600
    stored = {"images": IMAGE_BYTES, "tokens": row_bytes}
    storage = {
        f"store {name}": f"{size * num_images / 1e12:.3g} TB, ${size * num_images / 1e12 * DOLLARS_PER_TB_MONTH:,.0f} a month"
        for name, size in stored.items()
    }
    return storage | {
        "read": f"{core_hours:,.0f} core hours, ${core_hours * DOLLARS_PER_CORE_HOUR:,.0f}",
        "encode on cores": f"{on_cores:,.0f} core hours, ${on_cores * DOLLARS_PER_CORE_HOUR:,.0f}",
        "encode on GPUs": f"{encode_hours:,.2g} GPU hours, if {core_hours / encode_hours:,.0f} cores read for each",
        "train, once over all": f"{train_hours:,.0f} GPU hours, ${train_hours * DOLLARS_PER_HOUR:,.0f}",
    }


def main() -> None:
    """Measure the rates, and print them and the estimate."""
    torch.set_num_threads(1)
    vqvae = VQVAE(VQVAEConfig(image_size=256, num_downsamples=4, codebook_size=8192))
    mnist = VQDrawImageConfig(
        image_size=28,
        num_channels=1,
        num_stages=10,
        hidden_channels=32,
        feature_channels=32,
        num_residual_blocks=1,
        beam_size=1,
    )
    layout = SequenceLayout(
        text_vocab_size=16_384, text_length=64, num_codes=256, codebook_size=8192, positions_per_codebook=(256,)
    )
    reading, encoding = rate_of_reading(vqvae, 32), rate_of_encoding(vqvae, 2)
    training = rate_of_training(layout, depth=6, batch_size=2)
    with torch.device("meta"):
        settings = shape_settings("qwen3", layout, 27, 0.0)
        large = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **settings))
    in_products = num_parameters(large) - large.get_input_embeddings().weight.numel()
    flops_per_token = 6 * in_products  # per weight two in the forward pass and four in the backward pass
    print("load a 256-pixel JPEG:     ", reading)
    print("VQ-VAE, 256 pixels:        ", encoding)
    print("VQ-DRAW, 28 pixels:        ", rate_of_encoding(VQDrawForImages(mnist), 16))
    print("train a prior, per token:  ", training)
    print(f"bytes per row of tokens:    {(row_bytes := token_bytes(layout)):.0f}")
    print(f"parameters: {num_parameters(large):,}, FLOP per token: {flops_per_token:.3g}")
    stages = plan(
        num_images=1e9,
        reading=reading,
        encoding=encoding,
        flops_per_token=flops_per_token,
        tokens=layout.sequence_length,
        row_bytes=row_bytes,
    )
    for stage, cost in stages.items():
        print(f"{stage}: {cost}")


if __name__ == "__main__":
    main()
