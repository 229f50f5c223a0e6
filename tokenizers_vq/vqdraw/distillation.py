"""Distillation of a VQ-DRAW model into a student that encodes and decodes in one pass.

A VQ-DRAW model runs its refiner at every stage. The student's encoder sees the image once. Only a
small head runs stage by stage, because the codes before it decide what the next one means.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ..base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput
from ..images.normalization import PixelNormalization
from ..model_with_loss import ModelWithLoss
from ..modules.conv import ResidualBlock, downsampling, group_norm, upsampling
from ..validation import check_image_size
from .image_tokenizer import VQDrawForImages

STRIDE = 4  # pixels per cell of the grid that encoder and decoder work on


class VQDrawStudentConfig(DiscreteTokenizerConfig):
    """Settings of a `VQDrawStudent`. `from_teacher` copies those that must be the teacher's.

    Attributes:
        image_size: Height and width of the images in pixels, a multiple of 4; the teacher's.
        num_channels: Channels of the images; the teacher's.
        num_stages: Number of codes of an image; the teacher's.
        codebook_size: Options at each stage; the teacher's.
        hidden_channels: Channels of the networks on the quarter grid (default 96).
        num_residual_blocks: Residual blocks of encoder and decoder (default 2).
        vector_dim: Dimension of an image's vector between encoder and codes (default 384).
        pixel_mean: Mean that is subtracted from pixels in [0, 1]; the teacher's.
        pixel_std: Standard deviation that they are divided by; the teacher's.

    Example:
        >>> config = VQDrawStudentConfig(image_size=8, num_stages=4, codebook_size=16)
        >>> config.num_stages, config.vector_dim
        (4, 384)
    """

    model_type = "tok2img_vqdraw_student"

    image_size: int = 32
    num_channels: int = 3
    num_stages: int = 20
    codebook_size: int = 64
    hidden_channels: int = 96
    num_residual_blocks: int = 2
    vector_dim: int = 384
    pixel_mean: float = 0.5
    pixel_std: float = 0.25

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_image_size(self.image_size, STRIDE)

    @classmethod
    def from_teacher(cls, teacher: VQDrawForImages, **settings: Any) -> "VQDrawStudentConfig":
        """Return the config of a student that has the codes of a teacher.

        Args:
            teacher: Trained VQ-DRAW model.
            settings: Sizes of the student's networks, or other settings.
        """
        names = ("image_size", "num_channels", "codebook_size", "pixel_mean", "pixel_std")
        shared: dict[str, Any] = {name: getattr(teacher.config, name) for name in names}
        return cls(**{**shared, "num_stages": teacher.num_codes, **settings})


class VQDrawStudent(DiscreteTokenizer):
    """Image tokenizer with the codes of a VQ-DRAW model, several times faster. `Distillation` trains it.

    Args:
        config: Settings of the model.

    Example:
        >>> import torch
        >>> config = VQDrawStudentConfig(image_size=8, num_stages=4, codebook_size=16, hidden_channels=16)
        >>> student = VQDrawStudent(config).eval()
        >>> codes = student.encode(torch.rand(2, 3, 8, 8))
        >>> codes.shape, student.decode(codes).shape
        (torch.Size([2, 4]), torch.Size([2, 3, 8, 8]))
    """

    config_class = VQDrawStudentConfig
    config: VQDrawStudentConfig

    def __init__(self, config: VQDrawStudentConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config)
        channels, side = config.hidden_channels, config.image_size // STRIDE
        grid = channels * side * side
        self.encoder = nn.Sequential(
            downsampling(config.num_channels, [channels // 2, channels]),
            *(ResidualBlock(channels, channels) for _ in range(config.num_residual_blocks)),
            group_norm(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(grid, config.vector_dim),
        )
        self.code_head = CodeHead(config.num_stages, config.codebook_size, config.vector_dim)
        self.code_embedding = SummedCodeEmbedding(config.num_stages, config.codebook_size, config.vector_dim)
        self.decoder = nn.Sequential(
            nn.ReLU(),
            nn.Linear(config.vector_dim, config.vector_dim),
            nn.ReLU(),
            nn.Linear(config.vector_dim, grid),
            nn.Unflatten(1, (channels, side, side)),
            *(ResidualBlock(channels, channels) for _ in range(config.num_residual_blocks)),
            upsampling([channels, channels // 2], config.num_channels),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights as they are. Modules initialize their own."""

    @property
    def code_shape(self) -> tuple[int, ...]:
        """One code for each stage of the teacher."""
        return (self.config.num_stages,)

    @property
    def codebook_size(self) -> int:
        """Number of options at each stage, `k`."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """One for each stage: code 5 of stage 0 is unrelated to code 5 of stage 3."""
        return (1,) * self.num_codes

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encode images `b c h w` in [0, 1] to codes `b n`, each the most likely after those before it."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.code_head.greedy_decode(self.encoder(self.normalize(pixel_values, check_range=True)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `b n` to images `b c h w` in [0, 1]."""
        self.check_codes(codes)
        with torch.autocast(codes.device.type, enabled=False):
            return self.normalize.inverse(self.decode_normalized(codes.long()))

    def decode_normalized(self, codes: Tensor) -> Tensor:
        """Decode codes `b n` to normalized pixels `b c h w`, with gradients."""
        return self.decoder(self.code_embedding(codes))

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """Compute the squared error, reconstruction and codes of images `b c h w` in [0, 1].

        Only the decoder gets gradients from this loss. `Distillation` trains the whole student.
        """
        target, codes = self.normalize(pixel_values), self.encode(pixel_values)
        decoded = self.decode_normalized(codes)
        metrics = {"mse": self.normalize.squared_error(decoded, target)}
        return TokenizerOutput(F.mse_loss(decoded, target), self.normalize.inverse(decoded), codes, metrics)


class SummedCodeEmbedding(nn.Module):
    """Embedding of a code sequence: one table for each stage, summed over stages.

    Args:
        num_stages: Number of stages, n.
        codebook_size: Codes of a stage, k.
        dim: Dimension of the vectors, d.
    """

    def __init__(self, num_stages: int, codebook_size: int, dim: int):
        super().__init__()
        # The variance of a sum of n vectors is 2, as He et al. 2015 want before a ReLU.
        self.weight = nn.Parameter(torch.randn(num_stages, codebook_size, dim) * (2 / num_stages) ** 0.5)

    def forward(self, codes: Tensor) -> Tensor:
        """Embed codes `b n` as the sum of their vectors, `b d`."""
        return self.embed_each(codes).sum(dim=1)

    def embed_each(self, codes: Tensor) -> Tensor:
        """Embed codes `b n` as one vector each, `b n d`."""
        return self.weight[torch.arange(codes.shape[1], device=codes.device), codes]


class CodeHead(nn.Module):
    """Autoregressive distribution over codes, given the vector of an image.

    Args:
        num_stages: Number of stages, n.
        codebook_size: Codes of a stage, k.
        dim: Dimension of the vectors, d.
    """

    def __init__(self, num_stages: int, codebook_size: int, dim: int):
        super().__init__()
        self.code_embedding = SummedCodeEmbedding(num_stages, codebook_size, dim)
        self.norm, self.hidden = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.stage_embedding = nn.Parameter(torch.randn(num_stages, dim) * 0.02)
        self.weight = nn.Parameter(torch.randn(num_stages, codebook_size, dim) * dim**-0.5)

    def forward(self, features: Tensor, codes: Tensor) -> Tensor:
        """Compute the logits of all stages in parallel (teacher forcing).

        Args:
            features: Vectors of images, `b d`.
            codes: The right codes, `b n`. The logits of a stage depend on the codes before it.

        Returns:
            Logits, `b n k`.
        """
        earlier = F.pad(self.code_embedding.embed_each(codes)[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)
        hidden = self._transform(features[:, None] + earlier, self.stage_embedding)
        return einsum(hidden, self.weight, "b n d, n k d -> b n k")

    def greedy_decode(self, features: Tensor) -> Tensor:
        """Return the most likely code after those before it, stage by stage: `b d` -> `b n`."""
        codes = []
        for stage, weight in enumerate(self.weight):
            codes.append((self._transform(features, self.stage_embedding[stage]) @ weight.T).argmax(dim=1))
            features = features + self.code_embedding.weight[stage, codes[-1]]
        return torch.stack(codes, dim=1)

    def _transform(self, x: Tensor, stage_embedding: Tensor) -> Tensor:
        """Apply the hidden layer with a skip connection: `... d` -> `... d`."""
        normed = self.norm(x)
        return normed + F.relu(self.hidden(normed) + stage_embedding)


class Distillation(ModelWithLoss):
    """A student with its loss and its frozen teacher, for a trainer.

    Each training batch has the real images and as many images of random codes, which the teacher
    decodes. The student learns to predict the teacher's codes (cross-entropy) and to decode codes to
    the teacher's images (squared error).

    Args:
        student: Student to train.
        teacher: Trained VQ-DRAW model.

    Raises:
        ValueError: If the student has other image sizes or codes than the teacher.

    Example:
        >>> import torch
        >>> from tokenizers_vq import VQDrawForImages, VQDrawImageConfig
        >>> sizes = {"image_size": 8, "num_stages": 2, "codebook_size": 4, "hidden_channels": 16}
        >>> teacher = VQDrawForImages(VQDrawImageConfig(**sizes))
        >>> config = VQDrawStudentConfig.from_teacher(teacher, hidden_channels=16, vector_dim=8)
        >>> distillation = Distillation(VQDrawStudent(config), teacher).train()
        >>> distillation(torch.rand(3, 3, 8, 8)).loss.backward()
    """

    inner_name = "student"

    def __init__(self, student: VQDrawStudent, teacher: VQDrawForImages):
        super().__init__()
        expected = VQDrawStudentConfig.from_teacher(teacher)
        for name in ("image_size", "num_channels", "num_stages", "codebook_size"):
            ours, theirs = getattr(student.config, name), getattr(expected, name)
            if ours != theirs:
                raise ValueError(f"Expected a student with the teacher's {name} {theirs}, got {ours}.")
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode of the student. The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """Compute the loss, and the student's reconstruction and codes, of images `b c h w` in [0, 1].

        In eval mode it uses the real images alone, and the metrics compare student and teacher.
        """
        codes = self.teacher.encode(pixel_values)
        if not self.training:
            return self._evaluate(pixel_values, codes)
        random_codes = torch.randint_like(codes, self.teacher.codebook_size)
        codes = torch.cat([codes, random_codes])
        teacher_images = self.teacher.decode(codes)
        images = torch.cat([pixel_values, teacher_images[len(pixel_values) :]])
        return TokenizerOutput(*self._losses(images, codes, teacher_images))

    def _losses(
        self, images: Tensor, codes: Tensor, teacher_images: Tensor
    ) -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
        """Compute the two losses of the student.

        Args:
            images: Images to encode, `b c h w` in [0, 1].
            codes: The teacher's codes of them, `b n`.
            teacher_images: What the teacher decodes the codes to, `b c h w` in [0, 1].

        Returns:
            The fields of a `TokenizerOutput`: loss, reconstruction, codes and metrics.
        """
        logits = self.student.code_head(self.student.encoder(self.student.normalize(images)), codes)
        code_loss = F.cross_entropy(rearrange(logits.float(), "b n k -> b k n"), codes)
        decoded = self.student.decode_normalized(codes)
        decoder_loss = F.mse_loss(decoded, self.student.normalize(teacher_images))
        metrics = {"nats_per_code": code_loss.detach(), "decoder_mse": decoder_loss.detach()}
        return code_loss + decoder_loss, self.student.normalize.inverse(decoded), codes, metrics

    def _evaluate(self, pixel_values: Tensor, codes: Tensor) -> TokenizerOutput:
        """Compute losses and mean squared errors of pixels in [0, 1] on held-out images.

        The errors are those of the teacher, of the student, and of the student's codes that the
        teacher decodes.

        Args:
            pixel_values: Images, `b c h w` in [0, 1].
            codes: The teacher's codes of them, `b n`.
        """
        loss, _, _, metrics = self._losses(pixel_values, codes, self.teacher.decode(codes))
        student_codes = self.student.encode(pixel_values)
        reconstruction = self.student.decode(student_codes)
        metrics["teacher_mse"] = F.mse_loss(self.teacher.decode(codes), pixel_values)
        metrics["student_mse"] = F.mse_loss(reconstruction, pixel_values)
        metrics["student_to_teacher_mse"] = F.mse_loss(self.teacher.decode(student_codes), pixel_values)
        return TokenizerOutput(loss, reconstruction, student_codes, metrics)
