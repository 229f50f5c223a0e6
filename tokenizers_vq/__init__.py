"""Discrete tokenizers for images and text, as models of transformers.

Importing this package registers them with `AutoConfig` and `AutoModel`.
"""

from transformers import AutoConfig, AutoModel

from .base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput
from .images.loading import ImageError, load_image
from .losses.adversarial import AdversarialLoss, PatchDiscriminator
from .losses.reconstruction import PerceptualLoss
from .model_with_loss import ModelWithLoss
from .pretrained.image_tokenizer import PretrainedImageTokenizer, PretrainedImageTokenizerConfig
from .quantization.fsq import FSQ
from .quantization.residual_quantizer import ResidualQuantizer
from .quantization.vector_quantizer import QuantizerOutput, VectorQuantizer
from .text_base import TextSpanConfig, TextSpanTokenizer
from .vqdraw.distillation import Distillation, VQDrawStudent, VQDrawStudentConfig
from .vqdraw.image_tokenizer import VQDrawForImages, VQDrawImageConfig
from .vqdraw.text_tokenizer import VQDrawForText, VQDrawTextConfig
from .vqvae.configuration import VQVAEConfig
from .vqvae.image_tokenizer import VQVAE
from .vqvae.text_tokenizer import VQVAEForText, VQVAETextConfig
from .vqvae.with_loss import TokenizerWithLoss

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
