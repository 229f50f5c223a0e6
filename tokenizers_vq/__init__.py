"""Discrete tokenizers: pixels or text <-> codes. Importing this package registers them with transformers' `AutoModel`."""

from transformers import AutoConfig, AutoModel

from .adversarial import AdversarialLoss, PatchDiscriminator
from .base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput
from .distillation import Distillation, VQDrawStudent, VQDrawStudentConfig
from .fsq import FSQ
from .images import ImageError, load_image
from .pretrained import PretrainedImageTokenizer, PretrainedImageTokenizerConfig
from .quantizer import QuantizerOutput, VectorQuantizer
from .reconstruction import PerceptualLoss
from .residual import ResidualQuantizer
from .text_spans import TextSpanConfig, TextSpanTokenizer
from .vqdraw_image import VQDrawForImages, VQDrawImageConfig
from .vqdraw_text import VQDrawForText, VQDrawTextConfig
from .vqvae import VQVAE
from .vqvae_config import VQVAEConfig
from .vqvae_text import VQVAEForText, VQVAETextConfig
from .with_loss import ModelWithLoss, TokenizerWithLoss

__all__ = [
    "FSQ",
    "VQVAE",
    "AdversarialLoss",
    "DiscreteTokenizer",
    "DiscreteTokenizerConfig",
    "Distillation",
    "ImageError",
    "ModelWithLoss",
    "PatchDiscriminator",
    "PerceptualLoss",
    "PretrainedImageTokenizer",
    "PretrainedImageTokenizerConfig",
    "QuantizerOutput",
    "ResidualQuantizer",
    "TextSpanConfig",
    "TextSpanTokenizer",
    "TokenizerOutput",
    "TokenizerWithLoss",
    "VQDrawForImages",
    "VQDrawForText",
    "VQDrawImageConfig",
    "VQDrawStudent",
    "VQDrawStudentConfig",
    "VQDrawTextConfig",
    "VQVAEConfig",
    "VQVAEForText",
    "VQVAETextConfig",
    "VectorQuantizer",
    "load_image",
]

for config_class, model_class in (
    (VQVAEConfig, VQVAE),
    (VQDrawImageConfig, VQDrawForImages),
    (VQDrawTextConfig, VQDrawForText),
    (VQVAETextConfig, VQVAEForText),
    (VQDrawStudentConfig, VQDrawStudent),
    (PretrainedImageTokenizerConfig, PretrainedImageTokenizer),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
