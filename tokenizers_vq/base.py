"""What every discrete tokenizer promises: pixels or text in, codes out, and back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .loading import (
    CONFIG_FILE,
    DOWNLOAD_OPTIONS,
    build_config,
    build_on_meta,
    check_finite,
    check_state_dict_matches,
    first_line,
    read_config,
    read_tensors,
    resolve_model_folder,
)
from .validation import check_code_range, check_known_fields, check_number

# Keys that `save_pretrained` writes into config.json beside the fields of the class.
WRITTEN_BY_TRANSFORMERS = {
    "model_type",
    "name_or_path",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "torch_dtype",
    "use_cache",
}


class DiscreteTokenizerConfig(PreTrainedConfig):
    """Settings of a tokenizer, as dataclass fields.

    Raises:
        ValueError: for a name that is no field (with the nearest field), and for a whole number that is not one or below 1.
    """

    base_config_key = "tokenizer_config"
    zero_allowed: ClassVar[frozenset[str]] = frozenset()  # counts whose default is above zero

    def __post_init__(self, **other: Any) -> None:
        known = {field.name for field in fields(type(self))}
        unknown = other.keys() - WRITTEN_BY_TRANSFORMERS
        check_known_fields(type(self).__name__, unknown, known, listed=own_fields(type(self)))
        for name in own_fields(type(self)):
            default = 0 if name in self.zero_allowed else getattr(type(self), name, None)
            check_number(type(self).__name__, name, getattr(self, name), default)
        super().__post_init__(**other)


def own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """Names of the settings that a tokenizer's config adds to those of transformers."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(config_class) if field.name not in inherited]


@dataclass
class TokenizerOutput(ModelOutput):
    """What `forward` returns.

    Attributes:
        loss: what training lowers, a scalar.
        reconstruction: like the input, `b c h w` in [0, 1] for images.
        codes: `b n` int64.
        metrics: detached scalars worth a line in the log.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class DiscreteTokenizer(PreTrainedModel):
    """A model that turns each example into `num_codes` integers below `codebook_size`, and back.

    Images go in and come out as `pixel_values`, `b c h w` floats in [0, 1]; what normalisation a model wants is in its config
    and happens inside.
    """

    main_input_name = "pixel_values"

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one example's codes before they are laid out as a sequence, e.g. `(8, 8)` or `(10,)`."""
        raise NotImplementedError

    @property
    def num_codes(self) -> int:
        """Length of the code sequence of one example."""
        return torch.Size(self.code_shape).numel()

    @property
    def codebook_size(self) -> int:
        """How many values a code can take."""
        raise NotImplementedError

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """How many positions in a row read from one codebook: `(64,)` for a grid, `(1,) * 10` for stages, `(16, 64)` for two grids."""
        raise NotImplementedError

    def codebook_vectors(self) -> list[Tensor]:
        """The vectors `k d` that the codes of each group stand for; none where codes stand for more than a vector."""
        return []

    @property
    def supports_prefix_decoding(self) -> bool:
        """Whether the first few codes of an example decode too, to what it is so far."""
        return False

    def encode(self, pixel_values: Any, /) -> Tensor:
        """`b c h w` floats in [0, 1] -> codes `b n` int64, in float32 and without gradient."""
        raise NotImplementedError

    def encode_with_search(self, pixel_values: Tensor) -> Tensor:
        """As `encode`, for a data set that is tokenized once: with the better search, where a tokenizer knows one."""
        return self.encode(pixel_values)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> `b c h w` floats in [0, 1]. ValueError for codes of another shape, type or range."""
        raise NotImplementedError

    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """The image `b c h w` after each of the codes `b n` that changes it: here all at once, in one stage."""
        yield self.decode(codes)

    @property
    def num_init_examples(self) -> int:
        """How many examples `init_from_data` is to be shown, at most; 0 where nothing is placed by data."""
        return 0

    def init_from_data(self, pixel_values: Tensor, /) -> None:
        """Place what is placed by looking at data, from a batch of the training set, before the first step."""

    def check_codes(self, codes: Tensor, *, prefix: bool = False, num_codes: int = 0) -> None:
        """Refuse what is not `b n` integers in range (a negative index would silently pick the last code).

        Args:
            prefix: the first few codes will do.
            num_codes: n, where it is not that of the config.
        """
        num_codes = num_codes or self.num_codes
        least = 1 if prefix else num_codes
        if codes.ndim != 2 or not least <= codes.shape[1] <= num_codes:
            shape = " ".join(map(str, codes.shape))
            raise ValueError(f"codes must be `b {num_codes}`{' or a prefix' if prefix else ''}, got shape `{shape}`")
        check_code_range(codes, self.codebook_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and their like come down to, here and of a module that holds this one."""
        check_float32(fn(torch.zeros(())).dtype)
        return super()._apply(fn, recurse)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a saved tokenizer from a folder or the hub; its weights must be safetensors.

        Raises:
            ValueError: for a `dtype` other than float32, a folder that holds another model or none, settings out of bounds, and tensors
                that are missing, unknown, misshapen or not finite; all but the last before anything is allocated.
        """
        name, config = pretrained_model_name_or_path, kwargs.pop("config", None)
        for dtype in (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)):
            if dtype not in (None, "auto", "float32"):
                check_float32(dtype)
        try:
            folder = resolve_model_folder(name, **kwargs)
            saved = cls.saved_config(folder)
            config = config or saved
            check_state_dict_matches(build_on_meta(lambda: cls(config), folder), folder)
            settings = {key: value for key, value in kwargs.items() if key not in ("subfolder", *DOWNLOAD_OPTIONS)}
            # By its tensors, not by its folder: of a folder transformers opens whatever it knows, pickles too.
            settings |= {"config": config, "state_dict": read_tensors(folder), "dtype": torch.float32}
            loaded: Any = super().from_pretrained(None, *args, **settings)
        except OSError as error:
            raise ValueError(f"cannot load a tokenizer from {name}: {first_line(error)}") from error
        check_finite(loaded[0] if kwargs.get("output_loading_info") else loaded, name)
        return loaded

    @classmethod
    def saved_config(cls, folder: str | Path) -> Any:
        """The config in a folder; ValueError where it is that of another model, or none."""
        config_class: Any = cls.config_class
        settings, model_type = read_config(folder), config_class.model_type
        if settings.get("model_type") != model_type:
            raise ValueError(f"{folder} holds a {settings.get('model_type')}, not a {model_type}")
        return build_config(config_class, settings, Path(folder, CONFIG_FILE))


def check_float32(dtype: Any) -> None:
    """Refuse another type for a tokenizer's weights: codes found with rounded ones would be others."""
    if dtype != torch.float32:
        raise ValueError(f"a tokenizer has its weights in float32, got dtype {dtype}; torch.autocast makes it fast")
