"""Adapters for image tokenizers of transformers and diffusers.

All of them descend from VQ-GAN (Esser et al. 2021): an encoder computes a grid of vectors, the
nearest codebook entry of each is its code, and a decoder turns the entries into an image. The
classes differ in what comes between these parts. An adapter holds just that.
"""

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from einops import rearrange, repeat
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ..base import own_fields
from ..loading import first_line, missing_or_mismatched_keys, read_config, resolve_model_folder, tensor_headers
from ..validation import check_choice, check_known_fields, check_number


@dataclass(frozen=True)
class VQModelAdapter:
    """Access to the parts of one class of models.

    Attributes:
        library: Package that the class is imported from.
        saved_as: Its `model_type` or `_class_name` in a config.json.
        widths_field: Setting that lists the channels of the encoder's grids, each half as fine as
            the one before.
        codebook_size_field: Setting with the number of codebook entries.
        encode: Function of the model and normalized images `b c h w` to the vectors `b d h w` that
            are quantized.
        codebook: Function of the model to the entries `k d` that the vectors are compared with.
        decode: Function of the model and entries `b d h w` to normalized images `b c h w`.
    """

    library: str
    saved_as: str
    widths_field: str
    codebook_size_field: str
    encode: Callable[[Any, Tensor], Tensor]
    codebook: Callable[[Any], Tensor]
    decode: Callable[[Any, Tensor], Tensor]


def encode(model: Any, normalized: Tensor) -> Tensor:
    """Encode normalized images `b c h w` into vectors `b d h w`."""
    return model.quant_conv(model.encoder(normalized))


def codebook(model: Any) -> Tensor:
    """Return the codebook entries `k d`."""
    return model.quantize.embedding.weight


def decode(model: Any, entries: Tensor) -> Tensor:
    """Decode entries `b d h w` into normalized images `b c h w`."""
    return model.decoder(model.post_quant_conv(entries))


def encode_unit_length(model: Any, normalized: Tensor) -> Tensor:
    """Encode images into vectors `b d h w` of length 1.

    Janus was trained with them, but its port in transformers normalizes only in the decoder.
    """
    return F.normalize(encode(model, normalized), dim=1)


def unit_length_codebook(model: Any) -> Tensor:
    """Return the codebook entries `k d`, scaled to length 1."""
    return F.normalize(codebook(model), dim=1)


def decode_spatial(model: Any, entries: Tensor) -> Tensor:
    """Decode entries, which "spatial" norms (MoVQ, Zheng et al. 2022) read at every grid."""
    modulation = entries if model.config.norm_type == "spatial" else None
    return model.decoder(model.post_quant_conv(entries), modulation)


def encode_as_video(model: Any, normalized: Tensor) -> Tensor:
    """Encode images as still videos, of as many frames as the model merges into a grid."""
    video = repeat(normalized, "b c h w -> b t c h w", t=model.config.temporal_downsample_factor)
    vectors = model.quant_conv(rearrange(model.encoder(video), "b t c h w -> b c t h w"))
    return rearrange(vectors, "b d 1 h w -> b d h w")


def decode_first_frame(model: Any, entries: Tensor) -> Tensor:
    """Decode entries `b d h w` into a video, and return its first frame `b c h w`."""
    post = model.post_quant_conv(rearrange(entries, "b d h w -> b d 1 h w"))
    frames = model.decoder(rearrange(post, "b c t h w -> b t c h w"), rearrange(entries, "b d h w -> b 1 d h w"))
    return rearrange(frames, "(b t) c h w -> b t c h w", b=len(entries))[:, 0]


def raise_no_decoder(model: Any, entries: Tensor) -> Tensor:
    """Raise a ValueError, for Chameleon: transformers has only its encoder."""
    with_decoder = ", ".join(name for name, adapter in ADAPTERS.items() if adapter.decode is not raise_no_decoder)
    raise ValueError(
        "a ChameleonVQVAE of transformers has no decoder: it makes codes, but no images; "
        f"for images, wrap one of {with_decoder}"
    )


ADAPTERS = {
    "ChameleonVQVAE": VQModelAdapter(
        library="transformers",
        saved_as="chameleon_vqgan",
        widths_field="channel_multiplier",
        codebook_size_field="num_embeddings",
        encode=encode,
        codebook=codebook,
        decode=raise_no_decoder,
    ),
    "Emu3VQVAE": VQModelAdapter(
        library="transformers",
        saved_as="emu3_vqgan",
        widths_field="channel_multiplier",
        codebook_size_field="codebook_size",
        encode=encode_as_video,
        codebook=codebook,
        decode=decode_first_frame,
    ),
    "JanusVQVAE": VQModelAdapter(
        library="transformers",
        saved_as="janus_vqgan",
        widths_field="channel_multiplier",
        codebook_size_field="num_embeddings",
        encode=encode_unit_length,
        codebook=unit_length_codebook,
        decode=decode,
    ),
    "VQModel": VQModelAdapter(
        library="diffusers",
        saved_as="VQModel",
        widths_field="block_out_channels",
        codebook_size_field="num_vq_embeddings",
        encode=encode,
        codebook=codebook,
        decode=decode_spatial,
    ),
}
# Where whole models of transformers (Janus, Emu3, Chameleon) keep their image tokenizer: a key of
# config.json, and a pattern of tensor names.
VQ_CONFIG_KEY, VQ_TENSOR_PREFIX = "vq_config", r"^(model\.)?vqmodel\."


def import_model_class(name: str) -> Any:
    """Import one of the classes in `ADAPTERS`.

    Raises:
        ValueError: For another name, and if the class's library is not installed.
    """
    check_choice("model_class", name, ADAPTERS)
    library = ADAPTERS[name].library
    try:
        return getattr(importlib.import_module(library), name)
    except ImportError as error:
        raise ValueError(f"{name} is a class of {library}, which is not installed: pip install {library}") from error


def adapter_name(model: nn.Module) -> str:
    """Return the key in `ADAPTERS` of a model's class; raise a ValueError for other classes."""
    name = type(model).__name__
    if name not in ADAPTERS or not isinstance(model, import_model_class(name)):
        raise ValueError(
            f"expected an image tokenizer of one of the classes {', '.join(ADAPTERS)}, got a {name}; "
            "of a whole Janus, Emu3 or Chameleon model, give its `model.vqmodel`"
        )
    return name


def config_class(name: str) -> Any:
    """Return a model's config class, or None for diffusers, whose models take arguments."""
    return getattr(import_model_class(name), "config_class", None)


def default_settings(name: str) -> dict[str, Any]:
    """Return all settings that a class in `ADAPTERS` is built from, with their defaults."""
    config = config_class(name)
    if config is not None:
        return {key: getattr(config, key) for key in own_fields(config)}
    return {key: each.default for key, each in inspect.signature(import_model_class(name)).parameters.items()}


def check_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Check the settings of a class in `ADAPTERS`, and fill in defaults.

    Args:
        name: The class.
        settings: Values by name; those left out get their defaults.

    Returns:
        All settings, in the form that JSON gives back: tuples become lists, so that a saved config
        equals the original.

    Raises:
        ValueError: For an unknown setting, and a value of the wrong type.
    """
    known, config = default_settings(name), config_class(name)
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: model_settings must be a mapping, got {settings!r}")
    check_known_fields(name, settings.keys() - known.keys(), known, listed=known)
    for key, value in settings.items():
        check_number(name, key, value, known[key])
    if config is not None:
        try:
            config(**settings)
        except StrictDataclassError as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
    return json.loads(json.dumps(known | settings))


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """Build a model of a class in `ADAPTERS` with random weights."""
    config = config_class(name)
    return import_model_class(name)(**settings) if config is None else import_model_class(name)(config(**settings))


def load_original(name: str | Path, *, subfolder: str = "") -> nn.Module:
    """Load an image tokenizer that transformers or diffusers saved, alone or inside a whole model.

    Args:
        name: Folder, or name of a hub repository.
        subfolder: Folder inside it that holds the model.

    Raises:
        ValueError: For a folder without such a model, a class that is not in `ADAPTERS`, and
            missing or misshapen tensors.
    """
    try:
        model, info = _load_with_report(resolve_model_folder(name, subfolder=subfolder))
    except Exception as error:  # each library and class raises its own types
        raise ValueError(f"cannot load an image tokenizer from {name}: {first_line(error)}") from error
    if keys := missing_or_mismatched_keys(info):
        raise ValueError(
            f"{name} does not hold a whole {type(model).__name__}: missing or misshapen tensors {keys[:3]}"
        )
    return model


def _load_with_report(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in a folder and its library's loading report."""
    config = read_config(folder)
    tensor_headers(folder)  # raises an error for damaged files, before the library opens them
    settings = config.get(VQ_CONFIG_KEY, config)
    saved_as = settings.get("_class_name") or settings.get("model_type")
    name = next((key for key, adapter in ADAPTERS.items() if adapter.saved_as == saved_as), None)
    if name is None:
        raise ValueError(f"expected one of {', '.join(ADAPTERS)}, but the folder holds a {saved_as}")
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    # transformers then reports misshapen tensors; otherwise its error does not name them. That of
    # diffusers does.
    options["ignore_mismatched_sizes"] = config_class(name) is not None
    if settings is not config:
        options |= {"config": config_class(name)(**settings), "key_mapping": {VQ_TENSOR_PREFIX: ""}}
    return import_model_class(name).from_pretrained(str(folder), **options)
