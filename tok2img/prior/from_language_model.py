"""Makes a prior of a pretrained language model: text keeps its ids and what was learned of them, marks and image codes get rows after.

The layout's text ids are all rows that the model has, also those that its tokenizer never gives, so no row changes its meaning and the
loss of text stays what it was.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tokenizers_vq.loading import first_line, resolve_model_folder

from ..tokenization.layout import SequenceLayout
from .model import causal_lm_config, check_context, check_fits, generation_config_for, load_causal_lm


def base_config(base: str | Path) -> PreTrainedConfig:
    """The config of a saved causal language model; ValueError for a folder or hub name that holds none."""
    try:
        return causal_lm_config(resolve_model_folder(base))
    except OSError as error:
        raise ValueError(f"cannot load a language model from {base}: {first_line(error)}") from error


def base_vocab_size(base: str | Path) -> int:
    """How many ids a language model has rows for, used by its tokenizer or not."""
    return base_config(base).vocab_size


def extend_prior(base: str | Path, layout: SequenceLayout, *, seed: int = 0) -> PreTrainedModel:
    """A pretrained language model with rows for the marks and image codes of a layout.

    New rows, of the embeddings and of a head that is not tied to them, start at the mean of the old ones, spread as those are. Weights are
    in float32, whatever they were saved in.

    Args:
        base: folder or hub name.
        seed: of the new rows.

    Raises:
        ValueError: for a base that is no causal language model or not whole, and for a layout with other text ids or more positions.
    """
    config = base_config(base)
    if layout.text_vocab_size != config.vocab_size:
        raise ValueError(
            f"{base} has {config.vocab_size} ids, but the layout keeps {layout.text_vocab_size} for text: "
            f"tokenize for this model, with `tok2img tokenize ... --base-model {base}`"
        )
    check_context(config, layout)
    refused = ("missing_keys", "mismatched_keys")  # published weights often hold more than the language model
    prior = load_causal_lm(base, what="language model", refused_keys=refused, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior.resize_token_embeddings(layout.vocab_size, mean_resizing=False)
        init_added_embeddings(prior, layout)
    prior.config.bos_token_id, prior.config.eos_token_id = layout.bos_id, None
    prior.config.pad_token_id = layout.pad_id
    prior.generation_config = generation_config_for(layout)
    check_fits(prior, layout)
    return prior


@torch.no_grad()
def init_added_embeddings(prior: PreTrainedModel, layout: SequenceLayout) -> None:
    """Draw the rows after those of text from the normal distribution of the rows of text, number by number."""
    embeddings: Any = prior.get_input_embeddings()
    head: Any = prior.get_output_embeddings()
    tables = [embeddings.weight] if head.weight is embeddings.weight else [embeddings.weight, head.weight]
    for table in tables:
        normal_like(table[: layout.text_vocab_size], table[layout.text_vocab_size :])
    bias: Tensor | None = getattr(head, "bias", None)
    if bias is not None:
        bias[layout.text_vocab_size :] = bias[: layout.text_vocab_size].mean()


def normal_like(old: Tensor, new: Tensor) -> None:
    """Fill `m d` with numbers of the mean and spread that each column of `n d` has."""
    new.copy_(old.mean(dim=0) + old.std(dim=0) * torch.randn_like(new))
