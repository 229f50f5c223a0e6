"""Small convolutional classifier of captions, for data sets with few distinct ones, such as digits.

Its classes are the captions. It verifies whether a generated image shows its caption. Its features, trained on the
same kind of images, are those of the Fréchet distance and of the perceptual loss.
"""

import math
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils.generic import ModelOutput

from tokenizers_vq.base import WRITTEN_BY_TRANSFORMERS
from tokenizers_vq.images.loading import ImageSource, load_image
from tokenizers_vq.images.processing import pixels_from_images
from tokenizers_vq.loading import (
    CONFIG_FILE,
    build_config,
    build_on_meta,
    check_finite,
    check_state_dict_matches,
    read_config,
    read_tensors,
)
from tokenizers_vq.validation import check_known_fields, check_number

from ..data.augmentation import Augmentation
from ..trainer.datasets import ImageDataset
from ..trainer.trainer import Trainer

MAX_CAPTIONS = 1000
LEARNING_RATE = 3e-3
WARMUP_FRACTION = 0.3  # of a one-cycle schedule (Smith & Topin 2017)
SHIFT_FRACTION = 1 / 14  # of the image size: 2 pixels of MNIST's 28


class CaptionClassifierConfig(PreTrainedConfig):
    """Settings of a `CaptionClassifier`.

    Attributes:
        num_channels: 1 for gray images, 3 for RGB.
        image_size: Height and width of the images, in pixels.
        captions: The classes, 2 to 1,000 distinct captions.

    Raises:
        ValueError: For an unknown setting, a value out of range, or too few, too many or repeated captions.
    """

    model_type = "tok2img_caption_classifier"

    num_channels: Literal[1, 3]
    image_size: int
    captions: list[str]

    def __post_init__(self, **other: Any) -> None:
        own_names = ("num_channels", "image_size", "captions")
        known = {field.name for field in fields(type(self))}
        check_known_fields(type(self).__name__, other.keys() - WRITTEN_BY_TRANSFORMERS, known, listed=own_names)
        check_number(type(self).__name__, "num_channels", self.num_channels, 1)
        check_number(type(self).__name__, "image_size", self.image_size, 1)
        num_distinct = len(set(self.captions))
        if not 2 <= num_distinct == len(self.captions) <= MAX_CAPTIONS:
            raise ValueError(
                f"Expected 2 to {MAX_CAPTIONS:,} distinct captions, got {len(self.captions):,} captions, "
                f"{num_distinct:,} of them distinct. Rank images of free text with a CLIP ranker instead."
            )
        super().__post_init__(**other)


@dataclass
class CaptionClassifierOutput(ModelOutput):
    """Output of `CaptionClassifier.forward`.

    Attributes:
        loss: Cross-entropy, a scalar; None without labels.
        logits: One score for each caption of the config, `b k`.
        metrics: The batch's `accuracy`; None without labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class CaptionClassifier(PreTrainedModel):
    """Convolutional network that predicts which of its captions an image has."""

    config_class = CaptionClassifierConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CaptionClassifierConfig) -> None:
        super().__init__(config)
        self.body = nn.Sequential(
            *_downsampling(config.num_channels, 32, kernel_size=5),
            *_downsampling(32, 64, kernel_size=5),
            *_downsampling(64, 128, kernel_size=3),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128 * 16, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, len(config.captions))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initialization of PyTorch, where transformers would draw the weights again."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the activations before the last layer.

        Args:
            pixel_values: Images, `b c h w` in [0, 1].

        Returns:
            Features, `b d` with d = 128.
        """
        return self.body(pixel_values * 2 - 1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> CaptionClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Images, `b c h w` in [0, 1].
            labels: Index of each image's caption in `config.captions`, `b` int64; None: no loss.
        """
        logits = self.head(self.features(pixel_values))
        if labels is None:
            return CaptionClassifierOutput(logits=logits)
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        return CaptionClassifierOutput(
            loss=F.cross_entropy(logits, labels), logits=logits, metrics={"accuracy": accuracy}
        )

    @torch.inference_mode()
    def predict(self, pixel_values: Tensor) -> list[str]:
        """Return the most likely caption of each image of `b c h w` in [0, 1]."""
        logits: Any = self(pixel_values.to(self.device)).logits
        return [self.config.captions[index] for index in logits.argmax(dim=1).tolist()]

    def verify(self, image: ImageSource, caption: str) -> bool:
        """Check whether an image shows a caption.

        Args:
            image: An image of any size, in any form that `load_image` reads.
            caption: One of the captions that the classifier was trained on.

        Raises:
            ValueError: For another caption.
        """
        captions = self.config.captions
        if caption not in captions:
            raise ValueError(f"Expected one of the {len(captions)} captions of the training data, got {caption!r}.")
        return self.predict(self.load_pixels([image])) == [caption]

    def load_pixels(self, images: list[ImageSource]) -> Tensor:
        """Load images in any form as `b c h w` in [0, 1], with the classifier's size and channels."""
        return pixels_from_images(
            [load_image(image) for image in images],
            image_size=self.config.image_size,
            num_channels=self.config.num_channels,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a saved classifier onto the CPU, in eval mode.

        Args:
            folder: Folder that `save_pretrained` wrote.

        Raises:
            ValueError: If the folder does not contain a caption classifier, its settings are out
                of range, or a tensor is
                missing, unknown, of another shape or not finite. All but the last are found before memory is allocated.
        """
        path = Path(folder, CONFIG_FILE)
        settings = read_config(folder)
        if settings.get("model_type") != CaptionClassifierConfig.model_type:
            raise ValueError(f"{folder} does not contain a caption classifier: its {path.name} is of another model")
        config = build_config(CaptionClassifierConfig, settings, path)
        check_state_dict_matches(build_on_meta(lambda: cls(config), folder), folder)
        # From tensors, not from the folder, in which transformers would open any file that it knows, pickles too.
        classifier = super().from_pretrained(
            None, config=config, state_dict=read_tensors(Path(folder)), dtype=torch.float32
        )
        check_finite(classifier, folder)
        return classifier.eval()


class FeatureMaps(nn.Module):
    """Feature extractor for `tokenizers_vq.PerceptualLoss`: a classifier's activations at each resolution.

    Args:
        classifier: A trained classifier. The images may have another size than its own.
    """

    def __init__(self, classifier: CaptionClassifier):
        super().__init__()
        self.downsamplings = nn.ModuleList(classifier.body[first : first + 3] for first in (0, 3, 6))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the activations `b c h w` after each of the three downsamplings of images `b c h w` in [0, 1]."""
        maps = [pixel_values * 2 - 1]
        for downsampling in self.downsamplings:
            maps.append(downsampling(maps[-1]))
        return maps[1:]


class CaptionedImageDataset(ImageDataset):
    """Examples with `pixel_values` `c h w` and the index of their caption as `labels`.

    Args:
        dataset: Rows with an `image` and a `caption`.
        classifier: Classifier with all of these captions.
    """

    def __init__(self, dataset: Any, classifier: Any):
        index = {caption: label for label, caption in enumerate(classifier.config.captions)}
        self.labels = torch.tensor([index[caption] for caption in dataset["caption"][:]])
        super().__init__(dataset, classifier)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return super().__getitem__(row) | {"labels": self.labels[row]}


def train_classifier(
    dataset: Any,
    *,
    image_size: int,
    num_channels: Literal[1, 3],
    epochs: int = 3,
    batch_size: int = 128,
    seed: int = 0,
) -> CaptionClassifier:
    """Train a classifier of the captions of a data set, on the accelerator if there is one.

    Measured: on MNIST 100 seconds of one CPU core, 99.35 % of the 10,000 test digits right.

    Args:
        dataset: Rows with an `image` (anything that `load_image` reads) and a `caption`.
        image_size: Height and width that the images are resized to, in pixels.
        num_channels: 1 for gray, 3 for RGB.
        epochs: Passes over the data.
        batch_size: Images in a step, of all devices together.
        seed: Seed of the weights, the order and the shifts. PyTorch's global random state is restored afterwards.

    Returns:
        The classifier, in eval mode.

    Raises:
        ValueError: For fewer than 2 or more than 1,000 distinct captions, or an image that does not decode.
    """
    config = CaptionClassifierConfig(
        num_channels=num_channels, image_size=image_size, captions=sorted(set(dataset["caption"][:]))
    )
    batch_size = min(batch_size, len(dataset))
    num_steps = epochs * math.ceil(len(dataset) / batch_size)
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        classifier = CaptionClassifier(config)
        nn.utils.convert_conv2d_weight_memory_format(classifier, torch.channels_last)  # 1.3 times as fast on a CPU
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP_FRACTION * num_steps),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=False,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = Trainer(
            classifier,
            arguments,
            train_dataset=CaptionedImageDataset(dataset, classifier),
            augment=Augmentation(shift=round(SHIFT_FRACTION * image_size)),
        )
        trainer.train()
    return classifier.eval()


def _downsampling(num_inputs: int, num_outputs: int, *, kernel_size: int) -> list[nn.Module]:
    """Build a convolution of stride 2, batch norm and ReLU: `b c h w` to half the height and width."""
    convolution = nn.Conv2d(num_inputs, num_outputs, kernel_size, stride=2, padding=kernel_size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(num_outputs), nn.ReLU()]
