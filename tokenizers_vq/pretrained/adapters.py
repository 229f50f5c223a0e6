"""Image tokenizers of transformers and diffusers: how each class gets vectors from pixels, and pixels from vectors.

All of them descend from VQ-GAN (Esser et al. 2021): an encoder makes a grid of vectors, the nearest codebook entry of each is its code, and
a decoder draws the entries. They differ in what stands between these parts, which is all that is written here.
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
class Family:
    """What is particular to one class of model.

    Attributes:
        library: where the class comes from.
        saved_as: what a config.json calls it, as `model_type` or `_class_name`.
        levels: its setting that lists the widths of the grids, each half as fine as the one before.
        codebook_size: its setting with the number of codebook entries.
        latents: (model, normalised pixels `b c h w`) -> vectors `b d h w` to be quantized.
        codebook: model -> entries `k d` as they are compared with the vectors, and as they are drawn.
        draw: (model, entries `b d h w`) -> normalised pixels `b c h w`.
    """

    library: str
    saved_as: str
    levels: str
    codebook_size: str
    latents: Callable[[Any, Tensor], Tensor]
    codebook: Callable[[Any], Tensor]
    draw: Callable[[Any, Tensor], Tensor]


def latents(model: Any, normalized: Tensor) -> Tensor:
    """`b c h w` -> `b d h w`."""
    return model.quant_conv(model.encoder(normalized))


def codebook(model: Any) -> Tensor:
    """Entries `k d`."""
    return model.quantize.embedding.weight


def draw(model: Any, entries: Tensor) -> Tensor:
    """`b d h w` -> `b c h w`."""
    return model.decoder(model.post_quant_conv(entries))


def unit_latents(model: Any, normalized: Tensor) -> Tensor:
    """`b c h w` -> `b d h w` of length 1. Janus was trained so; the port in transformers has it in its decoder only."""
    return F.normalize(latents(model, normalized), dim=1)


def unit_codebook(model: Any) -> Tensor:
    """Entries `k d` of length 1."""
    return F.normalize(codebook(model), dim=1)


def decode_spatial(model: Any, entries: Tensor) -> Tensor:
    """`b d h w` -> `b c h w`; "spatial" norms of the decoder (MoVQ, Zheng et al. 2022) look at the entries at every grid."""
    modulation = entries if model.config.norm_type == "spatial" else None
    return model.decoder(model.post_quant_conv(entries), modulation)


def encode_as_video(model: Any, normalized: Tensor) -> Tensor:
    """`b c h w` -> `b d h w`: the image, held for as many frames as become one."""
    film = repeat(normalized, "b c h w -> b t c h w", t=model.config.temporal_downsample_factor)
    vectors = model.quant_conv(rearrange(model.encoder(film), "b t c h w -> b c t h w"))
    return rearrange(vectors, "b d 1 h w -> b d h w")


def decode_first_frame(model: Any, entries: Tensor) -> Tensor:
    """`b d h w` -> `b c h w`: the first of the frames that are drawn."""
    post = model.post_quant_conv(rearrange(entries, "b d h w -> b d 1 h w"))
    frames = model.decoder(rearrange(post, "b c t h w -> b t c h w"), rearrange(entries, "b d h w -> b 1 d h w"))
    return rearrange(frames, "(b t) c h w -> b t c h w", b=len(entries))[:, 0]


def raise_no_decoder(model: Any, entries: Tensor) -> Tensor:
    """ValueError: transformers has Chameleon's encoder alone."""
    drawing = ", ".join(name for name, family in FAMILIES.items() if family.draw is not raise_no_decoder)
    raise ValueError(
        "a ChameleonVQVAE of transformers has no decoder: it makes codes, but no images; "
        f"for images, wrap one of {drawing}"
    )


FAMILIES = {
    "ChameleonVQVAE": Family(
        "transformers", "chameleon_vqgan", "channel_multiplier", "num_embeddings", latents, codebook, raise_no_decoder
    ),
    "Emu3VQVAE": Family(
        "transformers",
        "emu3_vqgan",
        "channel_multiplier",
        "codebook_size",
        encode_as_video,
        codebook,
        decode_first_frame,
    ),
    "JanusVQVAE": Family(
        "transformers", "janus_vqgan", "channel_multiplier", "num_embeddings", unit_latents, unit_codebook, draw
    ),
    "VQModel": Family(
        "diffusers", "VQModel", "block_out_channels", "num_vq_embeddings", latents, codebook, decode_spatial
    ),
}
# Where the whole models of transformers keep their image tokenizer: in config.json, and in the names of their tensors.
PART, PART_PREFIX = "vq_config", r"^(model\.)?vqmodel\."


def model_class(name: str) -> Any:
    """The class that one of `FAMILIES` is about; ValueError for any other name, and where its library is not installed."""
    check_choice("family", name, FAMILIES)
    library = FAMILIES[name].library
    try:
        return getattr(importlib.import_module(library), name)
    except ImportError as error:
        raise ValueError(f"{name} is a class of {library}, which is not installed: pip install {library}") from error


def adapter_name(model: nn.Module) -> str:
    """The name in `FAMILIES` of a model's class; ValueError for a model of another class."""
    name = type(model).__name__
    if name not in FAMILIES or not isinstance(model, model_class(name)):
        raise ValueError(
            f"a {name} is none of the image tokenizers that can be wrapped: {', '.join(FAMILIES)}; "
            "of a whole Janus, Emu3 or Chameleon model, give its `model.vqmodel`"
        )
    return name


def config_class(name: str) -> Any:
    """Class of the config that a model of transformers takes; None for one of diffusers, which takes its settings as arguments."""
    return getattr(model_class(name), "config_class", None)


def default_settings(name: str) -> dict[str, Any]:
    """All settings that a class of `FAMILIES` is built from."""
    config = config_class(name)
    if config is not None:
        return {key: getattr(config, key) for key in own_fields(config)}
    return {key: each.default for key, each in inspect.signature(model_class(name)).parameters.items()}


def check_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a class of `FAMILIES`, those left out filled in, as JSON has them; ValueError for an unknown name or a wrong kind."""
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


def settings_of(model: Any) -> dict[str, Any]:
    """What a live model was built from."""
    return {key: getattr(model.config, key) for key in default_settings(adapter_name(model))}


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """A model of one of `FAMILIES` with random weights."""
    config = config_class(name)
    return model_class(name)(**settings) if config is None else model_class(name)(config(**settings))


def load_original(name: str | Path, *, subfolder: str = "") -> nn.Module:
    """The image tokenizer that a folder or a hub name holds, as its own library saved it, alone or in a whole model.

    Raises:
        ValueError: for what is no such folder, for a model that is none of `FAMILIES`, and for missing or misshapen tensors.
    """
    try:
        model, info = _load(resolve_model_folder(name, subfolder=subfolder))
    except Exception as error:  # each library and class makes something else of what it does not know
        raise ValueError(f"cannot load an image tokenizer from {name}: {first_line(error)}") from error
    if absent := missing_or_mismatched_keys(info):
        raise ValueError(
            f"{name} does not hold a whole {type(model).__name__}: missing or misshapen tensors {absent[:3]}"
        )
    return model


def _load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    config = read_config(folder)
    tensor_headers(folder)
    settings = config.get(PART, config)
    kind = settings.get("_class_name") or settings.get("model_type")
    family = next((key for key, family in FAMILIES.items() if family.saved_as == kind), None)
    if family is None:
        raise ValueError(f"it holds a {kind}, none of {', '.join(FAMILIES)}")
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    # transformers reports misshapen tensors then, and otherwise fails without their names; diffusers names them as it fails.
    options["ignore_mismatched_sizes"] = config_class(family) is not None
    if settings is not config:
        options |= {"config": config_class(family)(**settings), "key_mapping": {PART_PREFIX: ""}}
    return model_class(family).from_pretrained(str(folder), **options)
