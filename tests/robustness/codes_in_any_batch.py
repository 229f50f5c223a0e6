"""Codes the same examples in other batches, another order, with more threads and in other processes, and counts codes that differ.

    python tests/robustness/codes_in_any_batch.py CODES [PARQUET]

CODES of every tokenizer, of the images of a Parquet file (column "image") or of random smooth ones, and of random texts. Prints a line
of JSON for each tokenizer, and ends with 1 if any code differs.
"""

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizers_vq import (
    VQVAE,
    DiscreteTokenizer,
    VQDrawForImages,
    VQDrawForText,
    VQDrawImageConfig,
    VQDrawStudent,
    VQDrawStudentConfig,
    VQDrawTextConfig,
    VQVAEConfig,
    VQVAEForText,
    VQVAETextConfig,
    load_image,
)
from tokenizers_vq.images.processing import pixels_from_images

SIZE, BATCH_SIZE, OTHER_BATCH_SIZES = 16, 256, (1, 2, 7, 48)
NUM_TO_START = 200
SMALL = {"image_size": SIZE, "hidden_channels": 32}
TINY = {"image_size": SIZE, "hidden_channels": 16, "feature_channels": 8, "num_residual_blocks": 1, "codebook_size": 16}
SPANS = {"max_length": 24, "span_length": 6, "hidden_channels": 16}
MODELS: dict[str, Callable[[], DiscreteTokenizer]] = {
    "vqvae": lambda: VQVAE(VQVAEConfig(codebook_size=256, code_dim=16, **SMALL)),
    "vqvae, cosine": lambda: VQVAE(VQVAEConfig(codebook_size=256, code_dim=16, use_cosine_sim=True, **SMALL)),
    "vqvae of two grids": lambda: VQVAE(VQVAEConfig(codebook_size=256, code_dim=16, num_grids=2, **SMALL)),
    "residual": lambda: VQVAE(VQVAEConfig(codebook_size=64, code_dim=16, quantizer="residual", **SMALL)),
    "fsq": lambda: VQVAE(VQVAEConfig(quantizer="fsq", **SMALL)),
    "vqdraw": lambda: VQDrawForImages(VQDrawImageConfig(num_stages=20, **TINY)),
    "student": lambda: VQDrawStudent(VQDrawStudentConfig(num_stages=20, vector_dim=64, **SMALL)),
    "vqdraw_text": lambda: VQDrawForText(
        VQDrawTextConfig(feature_channels=8, embedding_dim=8, codebook_size=16, **SPANS)
    ),
    "vqvae_text": lambda: VQVAEForText(VQVAETextConfig(code_dim=16, **SPANS)),
}


def images(num: int, parquet: str) -> Tensor:
    """So many images, `b c h w`: of a file, over and over with a little noise where it has too few, or smooth random ones."""
    generator = torch.Generator().manual_seed(0)
    if not parquet:
        corners = torch.rand(num, 3, 4, 4, generator=generator)
        return F.interpolate(corners, size=SIZE, mode="bilinear", align_corners=True)
    rows = Dataset.from_parquet(parquet)
    shown = [load_image(image) for image in rows[: min(num, len(rows))]["image"]]
    pixels = pixels_from_images(shown, image_size=SIZE, num_channels=3)
    again = pixels.repeat(-(-num // len(pixels)), 1, 1, 1)[:num]
    noise = 0.02 * torch.randn(again.shape, generator=generator) * (torch.arange(num) >= len(pixels)).view(-1, 1, 1, 1)
    return (again + noise).clamp(0, 1)


def texts(model: Any, num: int) -> Tensor:
    """So many texts of random words, as symbols `b t`."""
    draw, words = torch.Generator().manual_seed(0), ["a", "red", "square", "and", "two", "blue", "cats", "above", "it"]
    rows = torch.randint(len(words), (num, 5), generator=draw).tolist()
    return model.texts_to_symbols([" ".join(words[word] for word in row) for row in rows])


@torch.no_grad()
def ready(model: DiscreteTokenizer, examples: Tensor) -> DiscreteTokenizer:
    """Off its start, where many options are alike, with codebooks placed on data."""
    for name, parameter in model.named_parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
        if name.endswith("quantizer.view.project_in.weight"):  # of an FSQ, whose numbers lie near 0 at first
            parameter.mul_(50)
    model.init_from_data(examples[:NUM_TO_START])
    return model.eval()


def in_batches(model: DiscreteTokenizer, examples: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model.encode(some) for some in examples.split(batch_size)])


def in_a_worker(folder: str, kind: str) -> None:
    """Code what lies in a folder, in a process of its own."""
    torch.set_num_threads(1)
    held = load_file(Path(folder, "examples"))
    model = type(MODELS[kind]()).from_pretrained(folder)
    save_file({"codes": in_batches(model, held["examples"], BATCH_SIZE)}, Path(folder, "codes"))


def main(num_codes: int, parquet: str = "", kinds: list[str] | None = None) -> dict[str, dict[str, int]]:
    """How many codes differ, by tokenizer and by what was done otherwise."""
    flips: dict[str, dict[str, int]] = {}
    transformers.logging.disable_progress_bar()
    for kind in kinds or list(MODELS):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = MODELS[kind]()
        num = -(-num_codes // model.num_codes)
        is_text = model.main_input_name == "symbols"
        examples = texts(model, max(num, NUM_TO_START)) if is_text else images(max(num, NUM_TO_START), parquet)
        model, examples = ready(model, examples), examples[:num]
        flips[kind] = flips_of(kind, model, examples)
        print(json.dumps({"tokenizer": kind, "codes": num * model.num_codes, **flips[kind]}), flush=True)
    return flips


def flips_of(kind: str, model: DiscreteTokenizer, examples: Tensor) -> dict[str, int]:
    codes, order = in_batches(model, examples, BATCH_SIZE), torch.randperm(len(examples))
    found = {f"batch {size}": in_batches(model, examples, size) for size in OTHER_BATCH_SIZES}
    found["order"] = in_batches(model, examples[order], BATCH_SIZE)[order.argsort()]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_file({"examples": examples}, Path(folder, "examples"))
        worker = multiprocessing.get_context("fork").Process(target=in_a_worker, args=(folder, kind))
        worker.start()
        worker.join()
        found["another process"] = load_file(Path(folder, "codes"))["codes"].clone()
    torch.set_num_threads(2)
    found["2 threads"] = in_batches(model, examples, BATCH_SIZE)
    torch.set_num_threads(1)
    assert len(codes.unique()) > 8, f"the {kind} codes everything alike, which shows nothing"
    return {name: int((other != codes).sum()) for name, other in found.items()}


if __name__ == "__main__":
    result = main(int(sys.argv[1]), *sys.argv[2:3])
    sys.exit(any(sum(each.values()) for each in result.values()))
