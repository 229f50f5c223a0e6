"""The prior: any causal language model of transformers, unmodified, sized for a layout and read through the head rows of its segments."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tokenizers_vq.loading import (
    CONFIG_FILE,
    build_config,
    check_finite,
    first_line,
    load_from_tensors,
    read_config,
    read_json,
    resolve_model_folder,
)
from tokenizers_vq.validation import did_you_mean

from ..tokenization.layout import Segment, SequenceLayout

ARCHITECTURES = ("qwen3", "llama", "gpt2")
WIDTH_PER_LAYER = 64
HEAD_SIZE = 64


def build_prior(
    layout: SequenceLayout,
    *,
    architecture: str = "qwen3",
    depth: int = 4,
    dropout: float = 0.0,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A causal language model with random weights, sized for a layout by one dial.

    Args:
        architecture: "qwen3", "llama", "gpt2", or any model type that `AutoModelForCausalLM` knows.
        depth: layers; the width is 64 times that, with heads of 64.
        dropout: of attention weights; with "gpt2" of embeddings and residuals too.
        overrides: settings of the model's own config.

    Raises:
        ValueError: for a model type that transformers does not know, or a setting that it refuses.
    """
    check_architecture(architecture)
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    settings = shape_settings(architecture, layout, depth, dropout) | overrides
    try:
        config = AutoConfig.for_model(architecture, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            prior = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"architecture {architecture!r} makes no causal language model: {first_line(error)}"
        ) from error
    prior.generation_config = generation_config_for(layout)
    check_fits(prior, layout)
    return prior


def generation_config_for(layout: SequenceLayout) -> GenerationConfig:
    """What stock `generate` has to know of a layout."""
    return GenerationConfig(do_sample=True, bos_token_id=layout.bos_id, pad_token_id=layout.pad_id)


def check_architecture(architecture: str) -> None:
    """ValueError for a model type of which transformers has no causal language model."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if architecture not in known:
        hint = did_you_mean(architecture, known) or f"presets are {', '.join(ARCHITECTURES)}"
        raise ValueError(f"architecture {architecture!r} makes no causal language model; {hint}")


def shape_settings(architecture: str, layout: SequenceLayout, depth: int, dropout: float) -> dict[str, Any]:
    """Config fields that follow from the layout and the dial, under the names that the architecture has for them."""
    width = WIDTH_PER_LAYER * depth
    common = {
        "vocab_size": layout.vocab_size,
        "bos_token_id": layout.bos_id,
        "eos_token_id": None,
        "pad_token_id": layout.pad_id,
    }
    if architecture == "gpt2":
        sizes = {"n_positions": layout.sequence_length, "n_embd": width, "n_layer": depth, "n_head": width // HEAD_SIZE}
        return common | sizes | {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
    return common | {
        "hidden_size": width,
        "intermediate_size": 64 * round(width * 8 / 3 / 64),
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD_SIZE,
        "num_key_value_heads": width // HEAD_SIZE,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": layout.sequence_length,
        "attention_dropout": dropout,
        "tie_word_embeddings": False,
    }


def load_prior(folder: str | Path, layout: SequenceLayout) -> PreTrainedModel:
    """Load a saved prior; ValueError for a folder that is none, missing or non-finite tensors, or a vocabulary that does not fit."""
    prior = load_causal_lm(folder, what="prior", refused_keys=("missing_keys", "mismatched_keys", "unexpected_keys"))
    check_fits(prior, layout)
    return prior


def load_causal_lm(folder: str | Path, *, what: str, refused_keys: tuple[str, ...], **settings: Any) -> PreTrainedModel:
    """Load a saved causal language model, in eval mode.

    Args:
        what: the model's part in this project, for errors.
        refused_keys: of what transformers reports about loading, what may not be.
        settings: for `from_pretrained`.

    Raises:
        ValueError: for a folder that holds none, tensors that may not be missing or there, and weights that are not finite.
    """
    try:
        place = resolve_model_folder(folder)
        config = causal_lm_config(place)
        settings["generation_config"] = saved_generation(place)
        model, info = load_from_tensors(AutoModelForCausalLM.from_config, place, config, **settings)
    except OSError as error:
        raise ValueError(f"cannot load a {what} from {folder}: {first_line(error)}") from error
    wrong = sorted(str(name) for key in refused_keys for name in info[key])
    if wrong:
        raise ValueError(f"{folder} does not hold a whole {what}: missing or unknown tensors {wrong[:3]}")
    check_finite(model, folder)
    return model.eval()


def causal_lm_config(folder: str | Path) -> Any:
    """The config in a folder; ValueError for that of anything but a causal language model."""
    settings = read_config(folder)
    try:
        check_architecture(settings.get("model_type", ""))
    except ValueError as error:
        raise ValueError(f"{folder} holds no language model: {error}") from error
    return build_config(CONFIG_MAPPING[settings["model_type"]], settings, Path(folder, CONFIG_FILE))


def saved_generation(folder: Path) -> GenerationConfig | None:
    """How a saved model draws, where its folder says it; ValueError for settings that say nothing."""
    path = folder / "generation_config.json"
    return build_config(GenerationConfig, read_json(path), path) if path.exists() else None


def check_fits(prior: PreTrainedModel, layout: SequenceLayout) -> None:
    """ValueError for a model whose vocabulary or context is too small for the layout, or whose head is not a plain product."""
    head = prior.get_output_embeddings()
    if head is None or head.weight.shape[0] < layout.vocab_size:
        rows = 0 if head is None else head.weight.shape[0]
        raise ValueError(f"the layout needs {layout.vocab_size} ids, but the model's head has {rows} rows")
    check_context(prior.config, layout)
    if getattr(prior.config, "final_logit_softcapping", None) or not has_plain_lm_head(prior, layout):
        kind = prior.config.model_type
        raise ValueError(f"{kind} models change their logits after the head; use one that does not, such as qwen3")


def check_context(config: PreTrainedConfig, layout: SequenceLayout) -> None:
    """ValueError for a model that does not read as many positions as the layout has."""
    context = getattr(config, "max_position_embeddings", layout.sequence_length)
    if context < layout.sequence_length:
        room = context - (layout.sequence_length - layout.text_length)
        way_out = f"give a text_length of {room} at most" if room > 0 else "take an image tokenizer of fewer codes"
        raise ValueError(f"the layout needs {layout.sequence_length} positions, but the model has {context}: {way_out}")


@torch.no_grad()
def has_plain_lm_head(prior: PreTrainedModel, layout: SequenceLayout) -> bool:
    """Whether logits are hidden states times the head's rows, and nothing more."""
    prompt = layout.prompt(layout.null_text_ids(1, prior.device))
    training = prior.training
    prior.eval()
    direct = prior(prompt).logits[:, -1, : layout.vocab_size]
    ours = segment_logits(prior, last_hidden_state(prior, prompt)[:, -1], 0, layout.vocab_size)
    prior.train(training)
    return torch.allclose(direct.float(), ours.float(), atol=1e-3, rtol=1e-3)


def last_hidden_state(prior: PreTrainedModel, input_ids: Tensor, added: Tensor | None = None) -> Tensor:
    """Hidden states under the head, `b s` -> `b s d`, with something `b s d` added to the embeddings."""
    if added is None:
        return prior.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    embeddings: Any = prior.get_input_embeddings()
    return prior.base_model(inputs_embeds=embeddings(input_ids) + added, use_cache=False).last_hidden_state


def segment_logits(prior: PreTrainedModel, hidden: Tensor, first: int, last: int) -> Tensor:
    """Logits of the ids `first..last-1` alone: `b s d` -> `b s v`."""
    weight, bias = lm_head_rows(prior, first, last)
    return F.linear(hidden, weight, bias)


def lm_head_rows(prior: PreTrainedModel, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    """The head's weights `v d` of the ids `first..last-1`, and their biases `v` where it has any."""
    head: Any = prior.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return head.weight[first:last], None if bias is None else bias[first:last]


def code_logits(prior: PreTrainedModel, hidden: Tensor, segment: Segment) -> Tensor:
    """Logits of each position's own codes: hidden states before the segment's positions `b n d` -> `b n k`.

    A product for each group, of rows that are taken off the head once: a slice for each would cost a gradient as large as the head each.
    Forward and back, 64 groups of one position with 64 codes each: 122 ms in one product for all, 15 ms so (one core, batch 16, width 256).
    """
    weight, bias = lm_head_rows(prior, segment.offset, segment.offset + segment.num_ids)
    weights = rearrange(weight, "(g k) d -> g k d", k=segment.codebook_size)
    biases = [None] * len(weights) if bias is None else rearrange(bias, "(g k) -> g k", k=segment.codebook_size)
    groups = zip(hidden.split(list(segment.groups), dim=1), weights, biases, strict=True)
    return torch.cat([F.linear(states, rows, shift) for states, rows, shift in groups], dim=1)


def caption_logits(prior: PreTrainedModel, hidden: Tensor, layout: SequenceLayout) -> Tensor:
    """Logits of the ids that a caption may have, text and the [PAD] that ends it: `... d` -> `... v`, others at minus infinity."""
    logits = segment_logits(prior, hidden, 0, layout.pad_id + 1)
    others = torch.tensor([layout.bos_id, layout.sep_id], device=logits.device)
    return logits.index_fill(-1, others, float("-inf"))
