"""The prior: any causal language model of transformers, unmodified.

Functions here build and load a prior for a layout, and compute logits of one segment's ids only.
"""

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
    """Build a causal language model with random weights, sized by its depth.

    Args:
        layout: The layout of its sequences.
        architecture: "qwen3", "llama", "gpt2", or any model type of `AutoModelForCausalLM`.
        depth: Number of layers. The width is 64 times that, in heads of 64.
        dropout: Dropout of attention weights; for "gpt2" of embeddings and residuals too.
        seed: Seed of the weights.
        **overrides: Settings of the model's own config.

    Returns:
        The prior.

    Raises:
        ValueError: If transformers does not know the model type or refuses a setting, or the model does not
            fit the layout.

    Example:
        >>> from tok2img import SequenceLayout, build_prior
        >>> layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
        >>> prior = build_prior(layout, architecture="llama", depth=2)
        >>> prior.config.hidden_size, prior.config.num_hidden_layers
        (128, 2)
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
    """Build the generation config with which stock `generate` samples from a layout's prior."""
    # No EOS id: an image ends after a fixed number of codes.
    return GenerationConfig(do_sample=True, bos_token_id=layout.bos_id, pad_token_id=layout.pad_id)


def check_architecture(architecture: str) -> None:
    """Check that transformers has a causal language model of this type.

    Raises:
        ValueError: If it does not.
    """
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if architecture not in known:
        hint = did_you_mean(architecture, known) or f"presets are {', '.join(ARCHITECTURES)}"
        raise ValueError(f"architecture {architecture!r} makes no causal language model; {hint}")


def shape_settings(architecture: str, layout: SequenceLayout, depth: int, dropout: float) -> dict[str, Any]:
    """Return the config settings that follow from layout and depth, under the architecture's names.

    Args:
        architecture: The model type.
        layout: The layout of the sequences.
        depth: Number of layers.
        dropout: Dropout rate.
    """
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
        # A gated MLP has three matrices: 8/3 of the width gives the parameters of 4 times with two.
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
    """Load a saved prior.

    Args:
        folder: The folder it was saved to.
        layout: The layout of its sequences.

    Returns:
        The prior, in eval mode.

    Raises:
        ValueError: If the folder has no prior, its tensors are incomplete or not finite, or it does not fit
            the layout.
    """
    forbidden_keys = ("missing_keys", "mismatched_keys", "unexpected_keys")
    prior = load_causal_lm(folder, role="prior", forbidden_keys=forbidden_keys)
    check_fits(prior, layout)
    return prior


def load_causal_lm(
    folder: str | Path, *, role: str, forbidden_keys: tuple[str, ...], **settings: Any
) -> PreTrainedModel:
    """Load a saved causal language model.

    Args:
        folder: A local folder, or the name of a repository on the hub.
        role: What the model is to us, for error messages.
        forbidden_keys: Entries of transformers' loading report that must be empty.
        **settings: Arguments of `from_pretrained`.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If there is no such model, or its tensors are incomplete or not finite.
    """
    try:
        model_folder = resolve_model_folder(folder)
        config = causal_lm_config(model_folder)
        generation_path = model_folder / "generation_config.json"
        settings["generation_config"] = (
            build_config(GenerationConfig, read_json(generation_path), generation_path)
            if generation_path.exists()
            else None
        )
        model, report = load_from_tensors(AutoModelForCausalLM.from_config, model_folder, config, **settings)
    except OSError as error:
        raise ValueError(f"cannot load a {role} from {folder}: {first_line(error)}") from error
    wrong = sorted(str(name) for key in forbidden_keys for name in report[key])
    if wrong:
        raise ValueError(f"{folder} does not hold a whole {role}: missing or unknown tensors {wrong[:3]}")
    check_finite(model, folder)
    return model.eval()


def causal_lm_config(folder: str | Path) -> Any:
    """Load the config of a causal language model.

    Raises:
        ValueError: If the folder's config is of another kind of model.
    """
    settings = read_config(folder)
    try:
        check_architecture(settings.get("model_type", ""))
    except ValueError as error:
        raise ValueError(f"{folder} holds no language model: {error}") from error
    return build_config(CONFIG_MAPPING[settings["model_type"]], settings, Path(folder, CONFIG_FILE))


def check_fits(prior: PreTrainedModel, layout: SequenceLayout) -> None:
    """Check that a prior can model the sequences of a layout.

    Raises:
        ValueError: If its vocabulary or context is too small, or its logits are not a plain product of hidden
            states and head.
    """
    head = prior.get_output_embeddings()
    if head is None or head.weight.shape[0] < layout.vocab_size:
        num_rows = 0 if head is None else head.weight.shape[0]
        raise ValueError(f"the layout needs {layout.vocab_size} ids, but the model's head has {num_rows} rows")
    check_context(prior.config, layout)
    if getattr(prior.config, "final_logit_softcapping", None) or not has_plain_lm_head(prior, layout):
        model_type = prior.config.model_type
        raise ValueError(
            f"{model_type} models change their logits after the head; use one that does not, such as qwen3"
        )


def check_context(config: PreTrainedConfig, layout: SequenceLayout) -> None:
    """Check that a model has at least as many positions as the layout.

    Raises:
        ValueError: If it has fewer.
    """
    context = getattr(config, "max_position_embeddings", layout.sequence_length)
    if context < layout.sequence_length:
        max_text_length = context - (layout.sequence_length - layout.text_length)
        way_out = (
            f"give a text_length of {max_text_length} at most"
            if max_text_length > 0
            else "take an image tokenizer of fewer codes"
        )
        raise ValueError(f"the layout needs {layout.sequence_length} positions, but the model has {context}: {way_out}")


@torch.no_grad()
def has_plain_lm_head(prior: PreTrainedModel, layout: SequenceLayout) -> bool:
    """Return True if logits are hidden states times the head's rows, without scaling or capping.

    Args:
        prior: The prior.
        layout: Its layout.
    """
    # Compared on a prompt, because transformers has no flag that says so.
    prompt = layout.prompt(layout.null_text_ids(1, prior.device))
    was_training = prior.training
    prior.eval()
    theirs = prior(prompt).logits[:, -1, : layout.vocab_size]
    ours = segment_logits(prior, last_hidden_state(prior, prompt)[:, -1], 0, layout.vocab_size)
    prior.train(was_training)
    return torch.allclose(theirs.float(), ours.float(), atol=1e-3, rtol=1e-3)


def last_hidden_state(prior: PreTrainedModel, input_ids: Tensor, added_embeddings: Tensor | None = None) -> Tensor:
    """Compute the hidden states that the head reads.

    Args:
        prior: The prior.
        input_ids: Ids, `b s`.
        added_embeddings: Added to the ids' embeddings, `b s d`.

    Returns:
        Hidden states, `b s d`.
    """
    if added_embeddings is None:
        return prior.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    embeddings: Any = prior.get_input_embeddings()
    inputs_embeds = embeddings(input_ids) + added_embeddings
    return prior.base_model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


def segment_logits(prior: PreTrainedModel, hidden: Tensor, first: int, last: int) -> Tensor:
    """Compute the logits of the ids `first..last-1` only.

    Args:
        prior: The prior.
        hidden: Last hidden states, `... d`.
        first: First id.
        last: The id after the last.

    Returns:
        Logits, `... v`.
    """
    weight, bias = lm_head_rows(prior, first, last)
    return F.linear(hidden, weight, bias)


def lm_head_rows(prior: PreTrainedModel, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    """Return the head's weights `v d` of the ids `first..last-1`, and their biases `v` if it has any."""
    head: Any = prior.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return head.weight[first:last], None if bias is None else bias[first:last]


def code_logits(prior: PreTrainedModel, hidden: Tensor, segment: Segment) -> Tensor:
    """Compute the logits of each position's own codes.

    Measured: 15 ms instead of 122 ms with one product for all groups, forward and backward (64 groups of one
    position, 64 codes each, batch 16, width 256, one core).

    Args:
        prior: The prior.
        hidden: Last hidden states before the segment's positions, `b n d`.
        segment: The image segment of the layout.

    Returns:
        Logits, `b n k`.
    """
    # The rows of all groups are sliced from the head together: the gradient of a slice is as large as the
    # whole head, and one slice per group would cost that much for each.
    weight, bias = lm_head_rows(prior, segment.offset, segment.offset + segment.num_ids)
    weights = rearrange(weight, "(g k) d -> g k d", k=segment.codebook_size)
    biases = [None] * len(weights) if bias is None else rearrange(bias, "(g k) -> g k", k=segment.codebook_size)
    groups = zip(hidden.split(list(segment.groups), dim=1), weights, biases, strict=True)
    return torch.cat([F.linear(states, rows, shift) for states, rows, shift in groups], dim=1)


def caption_logits(prior: PreTrainedModel, hidden: Tensor, layout: SequenceLayout) -> Tensor:
    """Compute the logits of the ids that a caption may contain: text, and the [PAD] that ends it.

    Args:
        prior: The prior.
        hidden: Last hidden states, `... d`.
        layout: The layout of the sequences.

    Returns:
        Logits of the ids up to [PAD], `... v`; those of [BOS] and [SEP] are minus infinity.
    """
    logits = segment_logits(prior, hidden, 0, layout.pad_id + 1)
    forbidden_ids = torch.tensor([layout.bos_id, layout.sep_id], device=logits.device)
    return logits.index_fill(-1, forbidden_ids, float("-inf"))
