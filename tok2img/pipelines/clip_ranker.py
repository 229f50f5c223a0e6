"""Which of several images shows its caption best: by the prior's own likelihoods, or by a CLIP model (Radford et al. 2021).

A ranker is anything that gives captions and images a score each, the higher the better.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tokenizers_vq import load_image
from tokenizers_vq.images.processing import pixels_from_images
from tokenizers_vq.loading import (
    CONFIG_FILE,
    build_config,
    check_finite,
    first_line,
    load_from_tensors,
    missing_or_mismatched_keys,
    read_config,
    read_json,
    resolve_model_folder,
)
from tokenizers_vq.validation import is_finite_number

from ..generation.likelihood import BATCH_SIZE
from ..tokenization.text_tokenizer import MAX_CHARACTERS_PER_TOKEN, SubwordTokenizer, check_texts

Ranker = Callable[[list[str], list[Image.Image]], Tensor]
PREPROCESSOR_FILE = "preprocessor_config.json"


def load_clip(folder: Path) -> CLIPModel:
    """The CLIP model of a folder; ValueError where it is not one, or not whole."""
    settings = read_config(folder)
    if settings.get("model_type") != "clip":
        raise ValueError(f"it holds a {settings.get('model_type')}")
    config = build_config(CLIPConfig, settings, folder / CONFIG_FILE)
    model, info = load_from_tensors(CLIPModel, folder, config)
    # Files of older versions hold the positions 0, 1, 2 ... too.
    unknown = sorted(name for name in info["unexpected_keys"] if not name.endswith("position_ids"))
    if wrong := missing_or_mismatched_keys(info) + unknown:
        raise ValueError(f"missing, misshapen or unknown tensors {wrong[:3]}")
    check_finite(model, folder)
    return model


def are_numbers(values: Any) -> TypeGuard[list[float]]:
    """Whether what a file held is a list of numbers, and not an empty one."""
    return isinstance(values, list) and bool(values) and all(map(is_finite_number, values))


class ClipRanker:
    """Scores images by the cosine between a CLIP model's views of them and of their captions.

    Args:
        model: any CLIP model of transformers, pretrained or of `tok2img train-ranker`.
        text_tokenizer: its tokenizer, as transformers loads it.
        pixel_mean, pixel_std: what its images are normalised by, a number for each channel.
    """

    def __init__(
        self, model: CLIPModel, text_tokenizer: Any, *, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ):
        self.text_tokenizer = text_tokenizer
        self.model: Any = model.eval()
        self.pixel_mean, self.pixel_std = list(pixel_mean), list(pixel_std)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a CLIP model with its tokenizer from a folder or the hub; ValueError where there is none."""
        try:
            folder = resolve_model_folder(name)
            pixels = read_json(folder / PREPROCESSOR_FILE)
            model = load_clip(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load a CLIP model from {name}: {first_line(error)}") from error
        mean, std = (pixels.get(f"image_{key}") for key in ("mean", "std"))
        if not are_numbers(mean) or not are_numbers(std) or 0 in std:
            what = f"got {mean!r:.80} and {std!r:.80}"
            raise ValueError(f"{folder / PREPROCESSOR_FILE}: image_mean and image_std must be numbers, {what}")
        text_tokenizer = SubwordTokenizer.from_pretrained(folder).tokenizer
        return cls(model, text_tokenizer, pixel_mean=mean, pixel_std=std)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model with its tokenizer and image settings, as transformers lays a CLIP folder out."""
        self.model.save_pretrained(str(folder))
        self.text_tokenizer.save_pretrained(str(folder))
        side = self.model.config.vision_config.image_size
        settings = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_mean": self.pixel_mean,
            "image_std": self.pixel_std,
        }
        Path(folder, PREPROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def __call__(self, captions: list[str], images: list[Image.Image]) -> Tensor:
        """A score from -1 to 1 for each caption and image, `b` on the CPU."""
        scores = []
        for first in range(0, len(captions), BATCH_SIZE):
            text = self.encode_text(captions[first : first + BATCH_SIZE])
            pixel_values = self.pixel_values(images[first : first + BATCH_SIZE])
            output = self.model(**text.to(self.model.device), pixel_values=pixel_values.to(self.model.device))
            scores.append((output.image_embeds * output.text_embeds).sum(dim=-1).float().cpu())
        return torch.cat(scores)

    def encode_text(self, captions: list[str]) -> Any:
        """Captions -> `input_ids` and `attention_mask`, all of one length whatever the batch; marks in captions are text."""
        length = self.model.config.text_config.max_position_embeddings
        check_texts(captions)
        return self.text_tokenizer(
            [caption[: length * MAX_CHARACTERS_PER_TOKEN] for caption in captions],
            split_special_tokens=True,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )

    def pixel_values(self, images: Sequence[Any]) -> Tensor:
        """Images in any form -> normalised `b c h w` of the model's size."""
        config: Any = self.model.config.vision_config
        pil_images = [load_image(image) for image in images]
        pixels = pixels_from_images(pil_images, image_size=config.image_size, num_channels=config.num_channels)
        mean, std = (rearrange(torch.tensor(each), "c -> c 1 1") for each in (self.pixel_mean, self.pixel_std))
        return (pixels - mean) / std
