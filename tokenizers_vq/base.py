"""The interface of every discrete tokenizer: images or text to integer codes, and back."""

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

# Keys that `save_pretrained` writes into config.json in addition to the fields of the class.
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
    """Base class of tokenizer configs, with settings as typed dataclass fields.

    transformers keeps unknown settings silently; here a misspelled name or a value of the wrong
    type is an error.

    Attributes:
        zero_allowed: Names of counts that may be 0 although their default is above 0.

    Raises:
        ValueError: For an unknown setting (the message names the nearest), and a value of another
            type or range than its default, see `check_number`.

    Example:
        >>> from tokenizers_vq import VQVAEConfig
        >>> VQVAEConfig(image_size=32, codebook_size=512).codebook_size
        512
        >>> VQVAEConfig(codebok_size=512)
        Traceback (most recent call last):
        ValueError: VQVAEConfig has no setting 'codebok_size'; did you mean 'codebook_size'?
    """

    base_config_key = "tokenizer_config"
    zero_allowed: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self, **other: Any) -> None:
        known = {field.name for field in fields(type(self))}
        unknown = other.keys() - WRITTEN_BY_TRANSFORMERS
        check_known_fields(type(self).__name__, unknown, known, listed=own_fields(type(self)))
        for name in own_fields(type(self)):
            default = 0 if name in self.zero_allowed else getattr(type(self), name, None)
            check_number(type(self).__name__, name, getattr(self, name), default)
        super().__post_init__(**other)


def own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """Return names of the settings that a config class adds to those of `PreTrainedConfig`."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(config_class) if field.name not in inherited]


@dataclass
class TokenizerOutput(ModelOutput):
    """Output of a tokenizer's `forward`.

    Attributes:
        loss: Training loss, a scalar.
        reconstruction: Decoded input: `b c h w` in [0, 1] for images, symbols `b t` for text.
        codes: Codes `b n`, int64.
        metrics: Detached scalars for the training log.

    Example:
        >>> import torch
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> model = VQVAE(VQVAEConfig(image_size=8, hidden_channels=16, codebook_size=16))
        >>> output = model(torch.rand(2, 3, 8, 8))
        >>> output.codes.shape, output.reconstruction.shape
        (torch.Size([2, 4]), torch.Size([2, 3, 8, 8]))
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class DiscreteTokenizer(PreTrainedModel):
    """Base class of models that turn examples into sequences of integers, and back.

    Images go in and come out as `pixel_values`, floats `b c h w` in [0, 1]. Normalization constants
    are in the config and applied inside the model. The codes of an example do not depend on the
    rest of its batch.

    Subclasses define `code_shape`, `codebook_size`, `positions_per_codebook`, `encode`, `decode`
    and `forward`. The other methods have a default.

    Example:
        >>> import torch
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> model = VQVAE(VQVAEConfig(image_size=8, hidden_channels=16, codebook_size=16)).eval()
        >>> codes = model.encode(torch.rand(2, 3, 8, 8))
        >>> codes.shape, codes.dtype, model.code_shape
        (torch.Size([2, 4]), torch.int64, (2, 2))
        >>> model.decode(codes).shape
        torch.Size([2, 3, 8, 8])
    """

    main_input_name = "pixel_values"

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of an example's codes, e.g. `(8, 8)` for a grid or `(10,)` for stages."""
        raise NotImplementedError

    @property
    def num_codes(self) -> int:
        """Number of codes of an example, `n`."""
        return torch.Size(self.code_shape).numel()

    @property
    def codebook_size(self) -> int:
        """Number of values that a code can take, `k`."""
        raise NotImplementedError

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """Number of consecutive codes that read each codebook; the sum is `num_codes`.

        `(64,)` for one grid of 8 x 8 cells, `(16, 64)` for two grids, `(1,) * 10` for ten stages.
        """
        raise NotImplementedError

    def codebook_vectors(self) -> list[Tensor]:
        """Return the vectors `k d` of each codebook; empty for models without such codebooks."""
        return []

    @property
    def supports_prefix_decoding(self) -> bool:
        """True if `decode` accepts the first codes of an example, for a coarser version of it."""
        return False

    def encode(self, pixel_values: Any, /) -> Tensor:
        """Encode images in float32, without gradient.

        Args:
            pixel_values: Images `b c h w`, floats in [0, 1].

        Returns:
            Codes `b n`, int64.

        Raises:
            ValueError: For another shape, dtype or range.
        """
        raise NotImplementedError

    def encode_with_search(self, pixel_values: Tensor) -> Tensor:
        """Encode images with a search for better codes if there is one, slower than `encode`.

        For a data set that is tokenized once.

        Args:
            pixel_values: Images `b c h w`, floats in [0, 1].

        Returns:
            Codes `b n`, int64.
        """
        return self.encode(pixel_values)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes into images.

        Args:
            codes: Codes `b n`, integers in 0..codebook_size - 1.

        Returns:
            Images `b c h w`, floats in [0, 1].

        Raises:
            ValueError: For codes of another shape, dtype or range.
        """
        raise NotImplementedError

    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield the images `b c h w` after each stage of codes `b n`; by default a single one."""
        yield self.decode(codes)

    @property
    def num_init_examples(self) -> int:
        """Number of examples that `init_from_data` can use, at most; 0 if it does nothing."""
        return 0

    def init_from_data(self, pixel_values: Tensor, /) -> None:
        """Initialize codebooks from a training batch `b c h w`, before the first step."""

    def check_codes(self, codes: Tensor, *, prefix: bool = False, num_codes: int = 0) -> None:
        """Check the shape, dtype and range of codes.

        An index that is too large crashes a GPU kernel, and a negative one silently picks an entry
        from the end.

        Args:
            codes: Codes `b n`, integers in 0..codebook_size - 1.
            prefix: Accept the first codes of each example, at least one.
            num_codes: Expected `n`; 0 means `self.num_codes`.

        Raises:
            ValueError: For codes of another shape, dtype or range.
        """
        num_codes = num_codes or self.num_codes
        least = 1 if prefix else num_codes
        if codes.ndim != 2 or not least <= codes.shape[1] <= num_codes:
            shape = " ".join(map(str, codes.shape))
            raise ValueError(f"codes must be `b {num_codes}`{' or a prefix' if prefix else ''}, got shape `{shape}`")
        check_code_range(codes, self.codebook_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Reject dtype conversions: `to()`, `half()` etc., also of a parent, call this hook."""
        check_float32(fn(torch.zeros(())).dtype)
        return super()._apply(fn, recurse)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a saved tokenizer from a folder or the hub; weights must be safetensors.

        Args:
            pretrained_model_name_or_path: Folder, or name of a hub repository.
            args: Further arguments of `PreTrainedModel.from_pretrained`.
            kwargs: Its keyword arguments, e.g. `revision` or `output_loading_info`.

        Returns:
            The tokenizer in eval mode, with float32 weights.

        Raises:
            ValueError: For a `dtype` other than float32, a folder without a model of this class,
                settings out of range, and tensors that are missing, unknown, misshapen or not
                finite. All but the last are found before any memory is allocated.
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
            # transformers gets the tensors, not the folder: in a folder it would open any file it
            # knows, pickles too.
            settings |= {"config": config, "state_dict": read_tensors(folder), "dtype": torch.float32}
            loaded: Any = super().from_pretrained(None, *args, **settings)
        except OSError as error:
            raise ValueError(f"cannot load a tokenizer from {name}: {first_line(error)}") from error
        check_finite(loaded[0] if kwargs.get("output_loading_info") else loaded, name)
        return loaded

    @classmethod
    def saved_config(cls, folder: str | Path) -> Any:
        """Return the config in a folder; raise a ValueError if it is not a config of this class."""
        config_class: Any = cls.config_class
        settings, model_type = read_config(folder), config_class.model_type
        if settings.get("model_type") != model_type:
            raise ValueError(f"{folder} holds a {settings.get('model_type')}, not a {model_type}")
        return build_config(config_class, settings, Path(folder, CONFIG_FILE))


def check_float32(dtype: Any) -> None:
    """Raise a ValueError for a tokenizer's weights in another dtype than float32.

    Rounded weights give other codes: bf16 flips 0.1 to 0.3 % of VQ codes and 18 % of VQ-DRAW codes.
    """
    if dtype != torch.float32:
        raise ValueError(f"a tokenizer has its weights in float32, got dtype {dtype}; torch.autocast makes it fast")
