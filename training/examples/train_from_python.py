"""Train on your own captioned images and generate images, with the Python API.

    python training/examples/train_from_python.py DATA OUT [STEPS]

The commands `tok2img train-tokenizer` and `tok2img train-prior` do the same with a recipe file.
"""

import sys
from pathlib import Path

from transformers import TrainingArguments

import tok2img
from tok2img.data.loading import held_out_split, load_captioned_images
from tok2img.recipes.build_processor import build_processor
from tok2img.recipes.build_tokenizer import build_image_tokenizer
from tok2img.recipes.config import TokenizerRecipe
from tok2img.trainer.datasets import ImageDataset


def main(data: str, out: Path, num_steps: int) -> None:
    """Train a VQ-VAE and a prior, and generate four images of the first caption; the first is saved."""
    rows, held_out = held_out_split(load_captioned_images(data), share=0.05, max_samples=500, seed=0)
    image_tokenizer = build_image_tokenizer(TokenizerRecipe(tokenizer="vqvae"), rows)
    settings = {
        "max_steps": num_steps,
        "per_device_train_batch_size": 32,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    tok2img.Trainer(
        image_tokenizer,
        TrainingArguments(str(out / "tokenizer"), learning_rate=3e-3, **settings),
        train_dataset=ImageDataset(rows, image_tokenizer),
        eval_dataset=ImageDataset(held_out, image_tokenizer),
    ).train()

    processor = build_processor(rows["caption"][:], image_tokenizer.eval())
    tokens = tok2img.tokenize_dataset(rows, processor).with_format("torch")
    prior = tok2img.build_prior(processor.layout, architecture="qwen3", depth=3)
    tok2img.Trainer(
        tok2img.PriorWithLoss(prior, processor.layout, caption_dropout=0.1),
        TrainingArguments(str(out / "prior"), learning_rate=1e-3, **settings),
        train_dataset=tokens,
    ).train()

    pipeline = tok2img.TextToImagePipeline(prior, processor)
    pipeline.save_pretrained(out / "model")
    pipeline(rows[0]["caption"], num_images_per_prompt=4, guidance_scale=3, seed=0).images[0].save(out / "image.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1000)
