"""A student of a VQ-DRAW model: one look gives all codes, and all codes at once give the image.

A VQ-DRAW model asks its refiner at every stage. The student's encoder sees the image once; what is left to do stage by stage is a small
step for each code, which must know the codes before it, since they decide what the next one means.
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

STRIDE = 4


class VQDrawStudentConfig(DiscreteTokenizerConfig):
    """Settings of a `VQDrawStudent`; `from_teacher` fills in those that follow from the model it learns from.

    Attributes:
        image_size, num_channels, num_stages, codebook_size, pixel_mean, pixel_std: those of the teacher.
        hidden_channels, num_residual_blocks: of the networks on the quarter grid.
        vector_dim: length of the vector that stands for an image.
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
        """The config of a student that reads and writes the codes of a teacher."""
        names = ("image_size", "num_channels", "codebook_size", "pixel_mean", "pixel_std")
        shared: dict[str, Any] = {name: getattr(teacher.config, name) for name in names}
        return cls(**{**shared, "num_stages": teacher.num_codes, **settings})


class VQDrawStudent(DiscreteTokenizer):
    """Reads and writes the codes of the VQ-DRAW model that it has learned from (see `Distillation`), several times faster."""

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
        """The parts initialise themselves."""

    @property
    def code_shape(self) -> tuple[int, ...]:
        """One code a stage of the teacher."""
        return (self.config.num_stages,)

    @property
    def codebook_size(self) -> int:
        """Options at each stage."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """Code 5 of stage 0 has nothing to do with code 5 of stage 3."""
        return (1,) * self.num_codes

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`: at each stage the likeliest after those before it."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.code_head.greedy_decode(self.encoder(self.normalize(pixel_values, check_range=True)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> `b c h w` in [0, 1]."""
        self.check_codes(codes)
        with torch.autocast(codes.device.type, enabled=False):
            return self.normalize.inverse(self.normalized(codes.long()))

    def normalized(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> normalised pixels `b c h w`."""
        return self.decoder(self.code_embedding(codes))

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> squared error, reconstruction and codes. Only the decoder learns from this; see `Distillation`."""
        target, codes = self.normalize(pixel_values), self.encode(pixel_values)
        drawn = self.normalized(codes)
        metrics = {"mse": self.normalize.squared_error(drawn, target)}
        return TokenizerOutput(F.mse_loss(drawn, target), self.normalize.inverse(drawn), codes, metrics)


class SummedCodeEmbedding(nn.Module):
    """Codes as vectors, one table a stage, added up."""

    def __init__(self, num_stages: int, codebook_size: int, dim: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(num_stages, codebook_size, dim) * (2 / num_stages) ** 0.5)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> their sum `b d`."""
        return self.embed_each(codes).sum(dim=1)

    def embed_each(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> vectors `b n d`."""
        return self.vectors[torch.arange(codes.shape[1], device=codes.device), codes]


class CodeHead(nn.Module):
    """Distributions over codes, each given what the image looks like and the codes before."""

    def __init__(self, num_stages: int, codebook_size: int, dim: int):
        super().__init__()
        self.code_embedding = SummedCodeEmbedding(num_stages, codebook_size, dim)
        self.norm, self.mix = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.stages = nn.Parameter(torch.randn(num_stages, dim) * 0.02)
        self.head = nn.Parameter(torch.randn(num_stages, codebook_size, dim) * dim**-0.5)

    def forward(self, seen: Tensor, codes: Tensor) -> Tensor:
        """What is seen `b d` and the right codes `b n` -> logits `b n k`, each knowing the codes before its own."""
        before = F.pad(self.code_embedding.embed_each(codes)[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)
        return einsum(self._hidden(seen[:, None] + before, self.stages), self.head, "b n d, n k d -> b n k")

    def greedy_decode(self, seen: Tensor) -> Tensor:
        """What is seen `b d` -> codes `b n`, one after another."""
        codes = []
        for stage, head in enumerate(self.head):
            codes.append((self._hidden(seen, self.stages[stage]) @ head.T).argmax(dim=1))
            seen = seen + self.code_embedding.vectors[stage, codes[-1]]
        return torch.stack(codes, dim=1)

    def _hidden(self, known: Tensor, stage: Tensor) -> Tensor:
        normed = self.norm(known)
        return normed + F.relu(self.mix(normed) + stage)


class Distillation(ModelWithLoss):
    """A student as the trainer sees it, with the teacher beside it: images in, loss out.

    The student learns from each batch of real images and as many images of random codes, of which there is no end: to name the
    teacher's codes (cross entropy), and to draw what the teacher draws (squared error).
    """

    inner_name = "student"

    def __init__(self, student: VQDrawStudent, teacher: VQDrawForImages):
        super().__init__()
        wanted = VQDrawStudentConfig.from_teacher(teacher)
        for name in ("image_size", "num_channels", "num_stages", "codebook_size"):
            if getattr(student.config, name) != getattr(wanted, name):
                came, expected = getattr(student.config, name), getattr(wanted, name)
                raise ValueError(f"this student has {name} {came}, its teacher {expected}")
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Distillation":
        """As for any module, but the teacher has learned enough."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> loss, the student's reconstruction and codes, metrics."""
        codes = self.teacher.encode(pixel_values)
        if not self.training:
            return self._compared(pixel_values, codes)
        random_codes = torch.randint_like(codes, self.teacher.codebook_size)
        codes = torch.cat([codes, random_codes])
        drawn = self.teacher.decode(codes)
        images = torch.cat([pixel_values, drawn[len(pixel_values) :]])
        return TokenizerOutput(*self._losses(images, codes, drawn))

    def _losses(self, images: Tensor, codes: Tensor, drawn: Tensor) -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
        """Of naming the codes of images, and of drawing what the teacher has drawn of them."""
        logits = self.student.code_head(self.student.encoder(self.student.normalize(images)), codes)
        naming = F.cross_entropy(rearrange(logits.float(), "b n k -> b k n"), codes)
        normalized = self.student.normalized(codes)
        drawing = F.mse_loss(normalized, self.student.normalize(drawn))
        metrics = {"nats_per_code": naming.detach(), "drawing_error": drawing.detach()}
        return naming + drawing, self.student.normalize.inverse(normalized), codes, metrics

    def _compared(self, pixel_values: Tensor, codes: Tensor) -> TokenizerOutput:
        """On held-out images: the losses, and squared errors of pixels in [0, 1] of the student, the teacher, and both in turn."""
        loss, _, _, metrics = self._losses(pixel_values, codes, self.teacher.decode(codes))
        own = self.student.encode(pixel_values)
        reconstruction = self.student.decode(own)
        metrics["teacher_mse"] = F.mse_loss(self.teacher.decode(codes), pixel_values)
        metrics["student_mse"] = F.mse_loss(reconstruction, pixel_values)
        metrics["student_to_teacher_mse"] = F.mse_loss(self.teacher.decode(own), pixel_values)
        return TokenizerOutput(loss, reconstruction, own, metrics)
