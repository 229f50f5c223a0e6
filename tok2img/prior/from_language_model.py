"""Extend a pretrained language model to a prior.

Text keeps its ids and embeddings; special tokens and image codes get rows after them. The layout's text ids
are all rows of the model, including those that its tokenizer never uses. So no row changes its meaning, and
the loss on text is unchanged.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tokenizers_vq.loading import first_line, resolve_model_folder

from ..tokenization.layout import SequenceLayout
from .model import causal_lm_config, check_context, check_fits, generation_config_for, load_causal_lm


def load_base_config(base: str | Path) -> PreTrainedConfig:
    """Load the config of a pretrained causal language model.

    Args:
        base: A local folder, or the name of a repository on the hub.

    Raises:
        ValueError: If there is no causal language model.
    """
    try:
        return causal_lm_config(resolve_model_folder(base))
    except OSError as error:
        raise ValueError(f"cannot load a language model from {base}: {first_line(error)}") from error


def base_vocab_size(base: str | Path) -> int:
    """Return the number of embedding rows of a language model, which its tokenizer need not use up."""
    return load_base_config(base).vocab_size


def extend_prior(base: str | Path, layout: SequenceLayout, *, seed: int = 0) -> PreTrainedModel:
    """Load a pretrained language model and add rows for special tokens and image codes.

    The new rows of the embeddings, and of an untied head, are sampled from a normal distribution with the
    mean and standard deviation of the old rows. Weights are float32, whatever they were saved in.

    Args:
        base: A local folder, or the name of a repository on the hub.
        layout: A layout whose `text_vocab_size` is the model's vocabulary size.
        seed: Seed of the new rows.

    Returns:
        The prior, in eval mode.

    Raises:
        ValueError: If the base is not a complete causal language model, or does not fit the layout.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tok2img import SequenceLayout, extend_prior
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> layout = SequenceLayout(text_vocab_size=32, text_length=3, num_codes=4, codebook_size=6)
        >>> with TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(folder)
        ...     prior = extend_prior(folder, layout)
        >>> prior.get_input_embeddings().weight.shape[0] == layout.vocab_size
        True
    """
    config = load_base_config(base)
    if layout.text_vocab_size != config.vocab_size:
        raise ValueError(
            f"{base} has {config.vocab_size} ids, but the layout keeps {layout.text_vocab_size} for text: "
            f"tokenize for this model, with `tok2img tokenize ... --base-model {base}`"
        )
    check_context(config, layout)
    # Published weights often hold more than the language model, so unexpected tensors are allowed.
    forbidden_keys = ("missing_keys", "mismatched_keys")
    prior = load_causal_lm(base, role="language model", forbidden_keys=forbidden_keys, dtype=torch.float32)
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
    """Sample the rows after those of text from a normal distribution fitted to each column of the text rows.

    Args:
        prior: The prior, changed in place.
        layout: Its layout.
    """
    embeddings: Any = prior.get_input_embeddings()
    head: Any = prior.get_output_embeddings()
    tables = [embeddings.weight] if head.weight is embeddings.weight else [embeddings.weight, head.weight]
    for table in tables:
        old, new = table[: layout.text_vocab_size], table[layout.text_vocab_size :]
        new.copy_(old.mean(dim=0) + old.std(dim=0) * torch.randn_like(new))
    bias: Tensor | None = getattr(head, "bias", None)
    if bias is not None:
        bias[layout.text_vocab_size :] = bias[: layout.text_vocab_size].mean()
