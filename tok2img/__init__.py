"""Train your own DALL-E: captioned pictures to discrete tokens, a plain Hugging Face GPT on them, and pictures from captions.

Names load when they are first used, so that `tok2img --help` needs neither torch nor transformers.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_when_wanted

if TYPE_CHECKING:
    from .captioning import caption
    from .dataset import TokenizeBatch, tokenize_dataset
    from .extend import extend_prior
    from .generation import LayoutLogitsProcessor, generate
    from .image_to_text import ImageToTextPipeline
    from .layout import SequenceLayout
    from .pipeline import TextToImagePipeline
    from .prior import build_prior
    from .prior_loss import PriorWithLoss
    from .processing import Tok2ImgProcessor
    from .ranking import ClipRanker
    from .sampling import Sampling
    from .shapes import shapes_dataset
    from .text import SubwordTokenizer, TextTokenizer
    from .text_codes import SpanTextTokenizer, load_text_tokenizer
    from .trainer import Trainer

# Large pages for large tensors, which torch reads when it first allocates one: a training step of a small prior on a CPU took 1.0 s
# instead of 2.9 s. Nothing happens where the kernel does not offer them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Threads that wait for each other soon let go of the core. Two threads of a small convolutional step on two cores, one of them busy with
# something else: 60 to 90 ms instead of 136 to 200; with both cores free as long as before (24 to 41 ms, 26 to 33).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# `transformers.pipeline("text-to-image", model=folder)` finds a pipeline of ours.
register_when_wanted()

HOME = {
    "ClipRanker": "ranking",
    "ImageToTextPipeline": "image_to_text",
    "LayoutLogitsProcessor": "generation",
    "PriorWithLoss": "prior_loss",
    "Sampling": "sampling",
    "SequenceLayout": "layout",
    "SpanTextTokenizer": "text_codes",
    "SubwordTokenizer": "text",
    "TextToImagePipeline": "pipeline",
    "TextTokenizer": "text",
    "Tok2ImgProcessor": "processing",
    "TokenizeBatch": "dataset",
    "Trainer": "trainer",
    "build_prior": "prior",
    "caption": "captioning",
    "extend_prior": "extend",
    "generate": "generation",
    "load_text_tokenizer": "text_codes",
    "shapes_dataset": "shapes",
    "tokenize_dataset": "dataset",
}
__version__ = "0.1.0"
__all__ = [
    "ClipRanker",
    "ImageToTextPipeline",
    "LayoutLogitsProcessor",
    "PriorWithLoss",
    "Sampling",
    "SequenceLayout",
    "SpanTextTokenizer",
    "SubwordTokenizer",
    "TextToImagePipeline",
    "TextTokenizer",
    "Tok2ImgProcessor",
    "TokenizeBatch",
    "Trainer",
    "build_prior",
    "caption",
    "extend_prior",
    "generate",
    "load_text_tokenizer",
    "shapes_dataset",
    "tokenize_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'tok2img' has no attribute {name!r}")
    return getattr(import_module(f".{HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOME])
