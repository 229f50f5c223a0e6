"""A small convolutional net that judges images of data sets with few distinct captions, such as digits.

Its classes are the captions. It says whether a drawn image shows its caption, and its features, trained on the
same kind of images, carry the Fréchet distance.
"""

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from tokenizers_vq.images.loading import ImageSource, load_image
from tokenizers_vq.images.processing import pixels_from_images
from tokenizers_vq.loading import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_on_meta,
    check_finite,
    check_state_dict_matches,
    read_json,
    read_tensors,
)
from tokenizers_vq.validation import check_known_fields, check_number

from ..atomic_io import write_atomically

MAX_CAPTIONS = 1000
MAX_LR = 3e-3


class CaptionClassifier(nn.Module):
    """Tells which of the known captions an image has.

    Args:
        num_channels: 1 for gray images, 3 for RGB
        image_size: side of the square images, in pixels
        captions: the classes, each caption once
    """

    def __init__(self, *, num_channels: Literal[1, 3], image_size: int, captions: list[str]) -> None:
        super().__init__()
        if not 2 <= len(set(captions)) == len(captions) <= MAX_CAPTIONS:
            raise ValueError(
                f"got {len(captions)} captions, {len(set(captions))} of them distinct: a caption classifier needs "
                f"2 to {MAX_CAPTIONS:,} distinct captions; judge free text with a ranking model instead"
            )
        self.num_channels: Literal[1, 3] = num_channels
        self.image_size, self.captions = image_size, captions
        self.body = nn.Sequential(
            *_halving(num_channels, 32, kernel_size=5),
            *_halving(32, 64, kernel_size=5),
            *_halving(64, 128, kernel_size=3),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128 * 16, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, len(captions))

    def features(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> the activations before the last layer, `b d` with d = 128."""
        return self.body(pixel_values * 2 - 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> logits `b k`, k in the order of `captions`."""
        return self.head(self.features(pixel_values))

    @torch.inference_mode()
    def predict(self, pixel_values: Tensor) -> list[str]:
        """The most likely caption of each image of `b c h w` in [0, 1]."""
        return [self.captions[index] for index in self(pixel_values).argmax(dim=1).tolist()]

    def judge(self, image: ImageSource, caption: str) -> bool:
        """Say whether an image of any size, or what `load_image` makes one of, shows what its caption says."""
        if caption not in self.captions:
            raise ValueError(f"got the caption {caption!r}, which is none of the {len(self.captions)} trained on")
        pixel_values = pixels_from_images(
            [load_image(image)], image_size=self.image_size, num_channels=self.num_channels
        )
        return self.predict(pixel_values.to(self.head.weight.device)) == [caption]

    def save(self, folder: str | PathLike[str]) -> None:
        """Write weights and captions into a folder, made if absent; each file appears whole or not at all."""
        config = {"num_channels": self.num_channels, "image_size": self.image_size, "captions": self.captions}
        weights = safetensors.torch.save({name: value.contiguous() for name, value in self.state_dict().items()})
        write_atomically(Path(folder) / WEIGHTS_FILE, weights)
        write_atomically(Path(folder) / CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "CaptionClassifier":
        """Read what `save` wrote, onto the CPU and in eval mode."""
        folder = Path(folder)
        config = read_json(folder / CONFIG_FILE)
        names = ("num_channels", "image_size", "captions")
        if set(names) - config.keys() or not isinstance(config["captions"], list):
            raise ValueError(f"{folder} holds no classifier of captions: {CONFIG_FILE} must hold {', '.join(names)}")
        check_known_fields(cls.__name__, config.keys() - {*names, "auto_map"}, names, listed=names)
        for name in names[:2]:
            check_number(cls.__name__, name, config[name], 1)
        sizes: dict[str, Any] = {name: config[name] for name in names}
        check_state_dict_matches(build_on_meta(lambda: cls(**sizes), folder), folder)
        classifier = cls(**sizes)
        classifier.load_state_dict(read_tensors(folder))
        check_finite(classifier, folder)
        return classifier.eval()


class FeatureMaps(nn.Module):
    """What a classifier sees in images, for `tokenizers_vq.PerceptualLoss`; any size of image will do."""

    def __init__(self, classifier: CaptionClassifier):
        super().__init__()
        self.halvings = nn.ModuleList(classifier.body[first : first + 3] for first in (0, 3, 6))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """`b c h w` in [0, 1] -> its activations after each halving, three of `b c h w`."""
        maps = [pixel_values * 2 - 1]
        for halving in self.halvings:
            maps.append(halving(maps[-1]))
        return maps[1:]


def train_classifier(
    dataset: Iterable[Mapping[str, Any]],
    *,
    image_size: int,
    num_channels: Literal[1, 3],
    epochs: int = 3,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> CaptionClassifier:
    """Train a classifier of the captions of a data set, with Adam and a one-cycle schedule (Smith & Topin 2017).

    Args:
        dataset: rows with an `image` (whatever `load_image` reads) and a `caption`;
            held in memory, a byte for each value of a pixel
        image_size: side in pixels that the images are brought to
        num_channels: 1 for gray, 3 for RGB
        epochs: passes over the data
        batch_size: images per step
        seed: of the weights, the order and the shifts; the global random state stays as it was

    Returns:
        The classifier, in eval mode. On MNIST it takes 3 minutes of one CPU core and tells 99.4 % of the test digits.
    """
    pixels, captions, labels = _load(dataset, image_size=image_size, num_channels=num_channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = CaptionClassifier(num_channels=num_channels, image_size=image_size, captions=captions)
    classifier.to(device)
    nn.utils.convert_conv2d_weight_memory_format(classifier, torch.channels_last)  # 1.3 times as fast on a CPU
    _fit(classifier, pixels, labels=labels, epochs=epochs, batch_size=batch_size, seed=seed)
    return classifier.eval()


def _fit(
    classifier: CaptionClassifier, pixels: Tensor, *, labels: Tensor, epochs: int, batch_size: int, seed: int
) -> None:
    """Train on images `b c h w` (uint8) and their labels `b`; an epoch leaves out the last, smaller batch."""
    device, max_shift = classifier.head.weight.device, classifier.image_size // 14
    generator = torch.Generator().manual_seed(seed)
    num_batches = max(1, len(pixels) // batch_size)
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=epochs * num_batches)
    for epoch in range(epochs):
        order = torch.randperm(len(pixels), generator=generator)
        batches = order[: num_batches * batch_size].tensor_split(num_batches)
        for rows in tqdm(batches, desc=f"classifier, epoch {epoch + 1}/{epochs}", unit="batch"):
            pixel_values = _shift(pixels[rows].float() / 255, max_shift=max_shift, generator=generator)
            loss = F.cross_entropy(classifier(pixel_values.to(device)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _halving(num_inputs: int, num_outputs: int, *, kernel_size: int) -> list[nn.Module]:
    """Convolution to half the size, batch norm and ReLU."""
    convolution = nn.Conv2d(num_inputs, num_outputs, kernel_size, stride=2, padding=kernel_size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(num_outputs), nn.ReLU()]


def _load(
    dataset: Iterable[Mapping[str, Any]], *, image_size: int, num_channels: Literal[1, 3]
) -> tuple[Tensor, list[str], Tensor]:
    """Rows -> images `b c h w` as uint8, the distinct captions in order, and their indices `b`."""
    images: list[Tensor] = []
    texts: list[str] = []
    for row in tqdm(dataset, desc="reading images", unit="image"):
        image = load_image(row["image"])
        pixel_values = pixels_from_images([image], image_size=image_size, num_channels=num_channels)
        images.append((pixel_values * 255).round().to(torch.uint8))
        texts.append(row["caption"])
    captions = sorted(set(texts))
    if not 2 <= len(captions) <= MAX_CAPTIONS:
        raise ValueError(
            f"the data set has {len(captions):,} distinct captions in {len(texts):,} rows; "
            f"a caption classifier needs 2 to {MAX_CAPTIONS:,}"
        )
    index = {caption: position for position, caption in enumerate(captions)}
    return torch.cat(images), captions, torch.tensor([index[text] for text in texts])


def _shift(pixel_values: Tensor, *, max_shift: int, generator: torch.Generator) -> Tensor:
    """Move each image of `b c h w` by up to `max_shift` pixels either way, repeating its border."""
    num_images, _, height, width = pixel_values.shape
    padded = F.pad(pixel_values, (max_shift,) * 4, mode="replicate")
    offsets = torch.randint(2 * max_shift + 1, (2, num_images, 1), generator=generator)
    rows = rearrange(offsets[0] + torch.arange(height), "b h -> b h 1")
    columns = rearrange(offsets[1] + torch.arange(width), "b w -> b 1 w")
    images = torch.arange(num_images)[:, None, None]
    return rearrange(padded[images, :, rows, columns], "b h w c -> b c h w")
