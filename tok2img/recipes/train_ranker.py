"""Train a small CLIP model (Radford et al. 2021) on captioned images. It ranks generated images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from tokenizers_vq import ModelWithLoss, load_image
from tokenizers_vq.images.processing import images_from_pixels, pixels_from_images

from ..pipelines.clip_ranker import ClipRanker, build_image_processor
from ..prior.loss import PriorOutput
from ..tokenization.text_tokenizer import SubwordTokenizer
from ..trainer.trainer import Trainer
from .build_tokenizer import infer_image_shape
from .config import RankerRecipe, require
from .run_folder import check_same_recipe
from .training_run import load_data, train_and_save, train_eval_split, training_arguments

EOS = "<|endoftext|>"
MAX_TEXT_LENGTH = 64
PATCHES_PER_SIDE = 8
HEAD_SIZE = 32


class RankerWithLoss(ModelWithLoss):
    """CLIP model with its contrastive loss.

    All images of equal captions in a batch count as matches of each of these captions (UniCL, Yang et al. 2022).
    """

    inner_name = "clip"

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> PriorOutput:
        """Return the loss, and the fraction of images whose caption is found among those of the batch.

        Args:
            input_ids: Captions, `b t`.
            attention_mask: 1 for text, 0 for padding, `b t`.
            pixel_values: Normalized images, `b c h w`.
        """
        output = self.clip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        same = (input_ids[:, None] == input_ids).all(dim=-1).float()
        targets = same / same.sum(dim=1, keepdim=True)
        logits = output.logits_per_image.float()
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        accuracy = same.gather(1, logits.argmax(dim=1, keepdim=True)).mean()
        return PriorOutput(loss=loss, metrics={"accuracy": accuracy.detach()})


class CaptionedImageDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Captioned images in the form that a CLIP model trains on."""

    def __init__(self, dataset: Any, ranker: ClipRanker):
        self.dataset, self.ranker = dataset, ranker

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        example = self.dataset[row]
        text = self.ranker.encode_text([example["caption"]])
        config = self.ranker.model.config.vision_config
        # Resize as for the image tokenizer, whose reconstructions the ranker scores. The ranker's image
        # processor keeps an image of its own size exact.
        pixels = pixels_from_images(
            [load_image(example["image"])], image_size=config.image_size, num_channels=config.num_channels
        )
        pixel_values = self.ranker.pixel_values(images_from_pixels(pixels))[0]
        return {
            "input_ids": text["input_ids"][0],
            "attention_mask": text["attention_mask"][0],
            "pixel_values": pixel_values,
        }


def train_ranker(recipe: RankerRecipe) -> ClipRanker:
    """Train a CLIP model on captioned images and save it to `recipe.out`."""
    require(recipe, "data", "out")
    check_same_recipe(recipe)  # before anything that takes long
    rows = load_data(recipe)
    ranker = build_ranker(rows, vocab_size=recipe.vocab_size, depth=recipe.depth, seed=recipe.seed)
    train_rows, eval_rows = (CaptionedImageDataset(some, ranker) for some in train_eval_split(rows, recipe))
    trainer = Trainer(
        RankerWithLoss(ranker.model),
        training_arguments(recipe),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        optimizer=recipe.optimizer,
        adamw_lr_scale=recipe.adamw_lr_scale,
    )
    train_and_save(trainer, recipe, lambda folder, _: ranker.save_pretrained(folder))
    ranker.model.eval()
    return ranker


def build_ranker(rows: Dataset, *, vocab_size: int, depth: int, seed: int = 0) -> ClipRanker:
    """Build a CLIP model with random weights for the sizes of the images and captions.

    Args:
        rows: Captioned images.
        vocab_size: Vocabulary size of the BPE that is trained on the captions.
        depth: Layers of each encoder. The width is 64 times that.
        seed: Seed of the weights.
    """
    captions: Sequence[str] = rows["caption"][:]
    text_tokenizer = bpe_with_eos(captions, vocab_size=vocab_size)
    length = min(MAX_TEXT_LENGTH, max(len(ids) for ids in text_tokenizer(sorted(set(captions)))["input_ids"]))
    shape = infer_image_shape(rows)
    side = shape["image_size"]
    width = 64 * depth
    layers = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD_SIZE,
    }
    end = text_tokenizer.eos_token_id
    ids = {"vocab_size": len(text_tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config=layers | ids | {"max_position_embeddings": length},
        vision_config=layers | shape | {"patch_size": choose_patch_size(side)},
        projection_dim=width,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
    image_processor = build_image_processor(image_size=side, num_channels=shape["num_channels"])
    return ClipRanker(model, text_tokenizer, image_processor)


def bpe_with_eos(captions: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train BPE that ends each text with an EOS token, at whose position CLIP reads the text's embedding."""
    backend = SubwordTokenizer.train_bpe(captions, vocab_size=vocab_size).tokenizer.backend_tokenizer
    backend.add_special_tokens([EOS])
    backend.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, backend.token_to_id(EOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=EOS, padding_side="right", split_special_tokens=True
    )


def choose_patch_size(image_size: int) -> int:
    """Return the smallest divisor of an image's side that leaves at most `PATCHES_PER_SIDE` patches along it."""
    return next(
        size for size in range(1, image_size + 1) if image_size % size == 0 and image_size // size <= PATCHES_PER_SIDE
    )
