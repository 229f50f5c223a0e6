"""Fine-tune a pretrained prior with LoRA (Hu et al. 2021), through peft.

The base model's weights stay frozen; the embeddings of special tokens and image codes are trained in full.
"""

import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..tokenization.layout import SequenceLayout
from .loss import PriorWithLoss


class LoraPriorWithLoss(PriorWithLoss):
    """A prior with adapters and its training loss. Its checkpoints hold weights and adapters, for resuming only."""

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        """Save all tensors under their present names.

        transformers would refuse: it does not know that peft shares some of them.

        Args:
            folder: Where to write; created if missing.
            state_dict: Ignored.
            **arguments: Ignored.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self.prior, str(Path(folder, "model.safetensors")))


def add_lora(prior: PreTrainedModel, layout: SequenceLayout, *, rank: int, seed: int = 0) -> Any:
    """Add adapters to every linear layer of an extended prior and freeze the rest.

    The embeddings of special tokens and image codes stay trainable. The prior computes the same as before.

    Args:
        prior: A prior from `extend_prior`, changed in place.
        layout: Its layout.
        rank: Rank of the adapters. Their scale, alpha / rank, is 2.
        seed: Seed of the adapters' weights.

    Returns:
        The peft model around the prior, for `merge_lora`.

    Raises:
        ValueError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("key 'lora_rank' needs peft, which is not installed: pip install 'tok2img[lora]'") from error
    embeddings: Any = prior.get_input_embeddings()
    head: Any = prior.get_output_embeddings()
    tables = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    # peft finds modules by the last part of their names.
    table_names = [
        name.rpartition(".")[2] for name, module in prior.named_modules() if any(module is table for table in tables)
    ]
    new_ids = list(range(layout.text_vocab_size, layout.vocab_size))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        trainable_token_indices=dict.fromkeys(table_names, new_ids),
        # GPT-2's Conv1D stores its weight transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in prior.modules()),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 uses a deprecated name of transformers
        torch.manual_seed(seed)
        return get_peft_model(prior, config)


def merge_lora(peft_model: Any) -> None:
    """Merge the adapters into the weights. The prior given to `add_lora` is a plain model again.

    Args:
        peft_model: What `add_lora` returned.
    """
    peft_model.merge_and_unload().requires_grad_(True)
