"""Rank generated images by how well they match their captions, with a CLIP model (Radford et al. 2021)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tokenizers_vq import load_image
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

# Any function of captions and images that returns one score each, `b`; higher is better.
Ranker = Callable[[list[str], list[Image.Image]], Tensor]
PREPROCESSOR_FILE = "preprocessor_config.json"
# CLIP models resize to at most 1.2 times the crop. A file that asks for far more would only exhaust memory.
MAX_RESIZE_FACTOR = 4


class ClipRanker:
    """Score images by the cosine similarity between CLIP's embeddings of image and caption.

    Args:
        model: A CLIP model of transformers, pretrained or trained by `tok2img train-ranker`.
        text_tokenizer: The model's tokenizer, as transformers loads it.
        image_processor: The model's own image processor.

    Example:
        >>> from PIL import Image
        >>> from transformers import CLIPConfig, CLIPModel
        >>> from tok2img import ClipRanker, SubwordTokenizer
        >>> from tok2img.pipelines.clip_ranker import build_image_processor
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> vision_config = sizes | {"image_size": 8, "patch_size": 4}
        >>> special_ids = {"bos_token_id": 300, "eos_token_id": 300, "pad_token_id": 300}
        >>> text_config = sizes | special_ids | {"vocab_size": 301}
        >>> model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config))
        >>> text_tokenizer = SubwordTokenizer.train_bpe(["a red dog"], vocab_size=300).tokenizer
        >>> num_added = text_tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        >>> ranker = ClipRanker(model, text_tokenizer, build_image_processor(image_size=8, num_channels=3))
        >>> ranker(["a red dog", "a dog"], [Image.new("RGB", (8, 8), "red")] * 2).shape
        torch.Size([2])
    """

    def __init__(self, model: CLIPModel, text_tokenizer: Any, image_processor: CLIPImageProcessorPil):
        self.model: Any = model.eval()
        self.text_tokenizer = text_tokenizer
        self.image_processor: Any = image_processor

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a CLIP model with its tokenizer and image processor.

        Args:
            name: A local folder, or the name of a repository on the hub.

        Raises:
            ValueError: If there is no complete CLIP model, or its preprocessing does not fit the model.
        """
        try:
            folder = resolve_model_folder(name)
            settings = read_json(folder / PREPROCESSOR_FILE)
            model = load_clip(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load a CLIP model from {name}: {first_line(error)}") from error
        image_processor = load_image_processor(settings, model.config.vision_config, source=folder / PREPROCESSOR_FILE)
        return cls(model, SubwordTokenizer.from_pretrained(folder).tokenizer, image_processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, tokenizer and `preprocessor_config.json`, in the format of a CLIP folder of transformers."""
        self.model.save_pretrained(str(folder))
        self.text_tokenizer.save_pretrained(str(folder))
        self.image_processor.save_pretrained(str(folder))

    @torch.inference_mode()
    def __call__(self, captions: list[str], images: list[Image.Image]) -> Tensor:
        """Score each image against its own caption.

        Args:
            captions: `b` captions.
            images: `b` images of any size.

        Returns:
            Cosine similarities from -1 to 1, `b` float32 on the CPU.
        """
        scores = []
        for first in range(0, len(captions), BATCH_SIZE):
            text = self.encode_text(captions[first : first + BATCH_SIZE])
            pixel_values = self.pixel_values(images[first : first + BATCH_SIZE])
            output = self.model(**text.to(self.model.device), pixel_values=pixel_values.to(self.model.device))
            scores.append((output.image_embeds * output.text_embeds).sum(dim=-1).float().cpu())
        return torch.cat(scores)

    def encode_text(self, captions: list[str]) -> Any:
        """Tokenize captions to the model's full text length, so that a score does not depend on its batch.

        Special tokens written out in a caption are read as ordinary text.

        Args:
            captions: `b` captions.

        Returns:
            A batch encoding with `input_ids` and `attention_mask`, each `b t`.
        """
        length = self.model.config.text_config.max_position_embeddings
        check_texts(captions)
        return self.text_tokenizer(
            # Truncated before tokenization, which would read a megabyte for the sake of its first tokens.
            [caption[: length * MAX_CHARACTERS_PER_TOKEN] for caption in captions],
            split_special_tokens=True,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )

    def pixel_values(self, images: Sequence[Any]) -> Tensor:
        """Preprocess images with the model's own image processor.

        Args:
            images: Paths, bytes or PIL images, of any size.

        Returns:
            Normalized pixels of the model's size, `b c h w`.
        """
        mode = "L" if self.model.config.vision_config.num_channels == 1 else "RGB"
        pil_images = [load_image(image).convert(mode) for image in images]
        return self.image_processor(pil_images, return_tensors="pt")["pixel_values"]


def load_clip(folder: Path) -> CLIPModel:
    """Load the CLIP model of a folder.

    Raises:
        ValueError: If the folder contains another model, or the tensors are incomplete or not finite.
    """
    settings = read_config(folder)
    if settings.get("model_type") != "clip":
        raise ValueError(f"Expected a model of type 'clip', got {settings.get('model_type')!r}.")
    config = build_config(CLIPConfig, settings, folder / CONFIG_FILE)
    model, info = load_from_tensors(CLIPModel, folder, config)
    # Files of older versions of transformers also hold the position ids 0, 1, 2, ...
    unknown = sorted(name for name in info["unexpected_keys"] if not name.endswith("position_ids"))
    if wrong := missing_or_mismatched_keys(info) + unknown:
        raise ValueError(f"missing, mismatched or unknown tensors {wrong[:3]}")
    check_finite(model, folder)
    return model


def load_image_processor(settings: dict[str, Any], config: Any, *, source: Path) -> CLIPImageProcessorPil:
    """Build the image processor that a preprocessor_config.json describes.

    The Pillow backend is chosen by name: the default one needs torchvision and resizes slightly differently.

    Args:
        settings: Content of the file.
        config: Config of the vision model that reads the pixels.
        source: Path of the file, for error messages.

    Raises:
        ValueError: If a setting is invalid, or the processor's output does not fit the model.
    """
    mean: Any = settings.get("image_mean")
    std: Any = settings.get("image_std")
    if (
        not all(isinstance(each, list) and each and all(map(is_finite_number, each)) for each in (mean, std))
        or 0 in std
    ):
        raise ValueError(f"{source}: image_mean and image_std must be numbers, got {mean!r:.80} and {std!r:.80}")
    side, channels = config.image_size, config.num_channels
    try:
        image_processor: Any = CLIPImageProcessorPil(**settings)
        lengths = [n for size in (image_processor.size, image_processor.crop_size) for n in dict(size).values() if n]
        if max(lengths) > MAX_RESIZE_FACTOR * side:
            raise ValueError(f"Expected sizes of at most {MAX_RESIZE_FACTOR * side} pixels, got {max(lengths)}.")
        blank = Image.new("L" if channels == 1 else "RGB", (side, side))
        shape = tuple(image_processor([blank], return_tensors="pt")["pixel_values"].shape)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {first_line(error)}") from error
    if shape != (1, channels, side, side):
        raise ValueError(f"{source}: Expected pixels of shape {(1, channels, side, side)}, got {shape}.")
    return image_processor


def build_image_processor(*, image_size: int, num_channels: int) -> CLIPImageProcessorPil:
    """Build an image processor that maps pixels to [-1, 1] and keeps images of `image_size` exact.

    Args:
        image_size: Height and width in pixels.
        num_channels: 3 for RGB, 1 for grayscale.
    """
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.5] * num_channels,
        image_std=[0.5] * num_channels,
        do_convert_rgb=num_channels == 3,
    )
