"""Discrete tokenizers: pixels or text <-> codes. Importing this package registers them with transformers' `AutoModel`."""

from transformers import AutoConfig, AutoModel

from .adversarial import AdversarialLoss, PatchDiscriminator
from .base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput
from .distillation import Distillation, VQDrawStudent, VQDrawStudentConfig
from .images import ImageError, load_image
from .quantizer import QuantizerOutput, VectorQuantizer
from .reconstruction import PerceptualLoss
from .vqdraw_image import VQDrawForImages, VQDrawImageConfig
from .vqdraw_text import VQDrawForText, VQDrawTextConfig
from .vqvae import VQVAE, VQVAEConfig
from .with_loss import ModelWithLoss, TokenizerWithLoss

__all__ = [
    "VQVAE",
    "AdversarialLoss",
    "DiscreteTokenizer",
    "DiscreteTokenizerConfig",
    "Distillation",
    "ImageError",
    "ModelWithLoss",
    "PatchDiscriminator",
    "PerceptualLoss",
    "QuantizerOutput",
    "TokenizerOutput",
    "TokenizerWithLoss",
    "VQDrawForImages",
    "VQDrawForText",
    "VQDrawImageConfig",
    "VQDrawStudent",
    "VQDrawStudentConfig",
    "VQDrawTextConfig",
    "VQVAEConfig",
    "VectorQuantizer",
    "load_image",
]

for config_class, model_class in (
    (VQVAEConfig, VQVAE),
    (VQDrawImageConfig, VQDrawForImages),
    (VQDrawTextConfig, VQDrawForText),
    (VQDrawStudentConfig, VQDrawStudent),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
