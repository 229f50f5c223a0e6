"""Count codes that depend on the batch, the order, the number of threads or the process.

    python tests/robustness/codes_in_any_batch.py CODES [PARQUET]

Encodes at least CODES codes with every tokenizer: images of a Parquet file (column "image") or random
smooth ones, and random texts. Prints one line of JSON for each tokenizer. The exit code is 1 if any
code differs.
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
NUM_INIT_EXAMPLES = 200
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
    """Load or generate images.

    Args:
        num: Number of images, b.
        parquet: File to load them from; "" generates smooth random images. If the file has too few,
            they repeat with a little noise.

    Returns:
        Pixels in [0, 1], `b c h w`.
    """
    generator = torch.Generator().manual_seed(0)
    if not parquet:
        corners = torch.rand(num, 3, 4, 4, generator=generator)
        return F.interpolate(corners, size=SIZE, mode="bilinear", align_corners=True)
    rows = Dataset.from_parquet(parquet)
    loaded = [load_image(image) for image in rows[: min(num, len(rows))]["image"]]
    pixels = pixels_from_images(loaded, image_size=SIZE, num_channels=3)
    repeated = pixels.repeat(-(-num // len(pixels)), 1, 1, 1)[:num]
    noise = (
        0.02 * torch.randn(repeated.shape, generator=generator) * (torch.arange(num) >= len(pixels)).view(-1, 1, 1, 1)
    )
    return (repeated + noise).clamp(0, 1)


def texts(model: Any, num: int) -> Tensor:
    """Return texts of random words as symbols `b t`."""
    generator, words = (
        torch.Generator().manual_seed(0),
        ["a", "red", "square", "and", "two", "blue", "cats", "above", "it"],
    )
    rows = torch.randint(len(words), (num, 5), generator=generator).tolist()
    return model.texts_to_symbols([" ".join(words[word] for word in row) for row in rows])


@torch.no_grad()
def perturb_and_init(model: DiscreteTokenizer, examples: Tensor) -> DiscreteTokenizer:
    """Perturb the weights, since many options of a new model are equal, and initialize codebooks from data."""
    for name, parameter in model.named_parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
        if name.endswith("quantizer.view.project_in.weight"):  # of an FSQ, whose latents are near 0 at first
            parameter.mul_(50)
    model.init_from_data(examples[:NUM_INIT_EXAMPLES])
    return model.eval()


def encode_in_batches(model: DiscreteTokenizer, examples: Tensor, batch_size: int) -> Tensor:
    """Encode examples `b ...` to codes `b n`, in batches."""
    return torch.cat([model.encode(some) for some in examples.split(batch_size)])


def encode_in_process(folder: str, kind: str) -> None:
    """Encode the examples of a folder with the model that is saved there."""
    torch.set_num_threads(1)
    examples = load_file(Path(folder, "examples"))["examples"]
    model = type(MODELS[kind]()).from_pretrained(folder)
    save_file({"codes": encode_in_batches(model, examples, BATCH_SIZE)}, Path(folder, "codes"))


def main(num_codes: int, parquet: str = "", kinds: list[str] | None = None) -> dict[str, dict[str, int]]:
    """Count the codes that differ, by tokenizer and by what was changed."""
    differences: dict[str, dict[str, int]] = {}
    transformers.logging.disable_progress_bar()
    for kind in kinds or list(MODELS):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = MODELS[kind]()
        num = -(-num_codes // model.num_codes)
        is_text = model.main_input_name == "symbols"
        examples = (
            texts(model, max(num, NUM_INIT_EXAMPLES)) if is_text else images(max(num, NUM_INIT_EXAMPLES), parquet)
        )
        model, examples = perturb_and_init(model, examples), examples[:num]
        differences[kind] = count_differences(kind, model, examples)
        print(json.dumps({"tokenizer": kind, "codes": num * model.num_codes, **differences[kind]}), flush=True)
    return differences


def count_differences(kind: str, model: DiscreteTokenizer, examples: Tensor) -> dict[str, int]:
    """Count the codes of one tokenizer that differ, by what was changed."""
    codes, order = encode_in_batches(model, examples, BATCH_SIZE), torch.randperm(len(examples))
    found = {f"batch {size}": encode_in_batches(model, examples, size) for size in OTHER_BATCH_SIZES}
    found["order"] = encode_in_batches(model, examples[order], BATCH_SIZE)[order.argsort()]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_file({"examples": examples}, Path(folder, "examples"))
        worker = multiprocessing.get_context("fork").Process(target=encode_in_process, args=(folder, kind))
        worker.start()
        worker.join()
        found["another process"] = load_file(Path(folder, "codes"))["codes"].clone()
    torch.set_num_threads(2)
    found["2 threads"] = encode_in_batches(model, examples, BATCH_SIZE)
    torch.set_num_threads(1)
    assert len(codes.unique()) > 8, f"the {kind} has too few different codes for a test"
    return {name: int((other != codes).sum()) for name, other in found.items()}


if __name__ == "__main__":
    result = main(int(sys.argv[1]), *sys.argv[2:3])
    sys.exit(any(sum(each.values()) for each in result.values()))
