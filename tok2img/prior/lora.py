"""Trains a pretrained prior by low-rank updates (Hu et al. 2021), through peft: the base's weights stay, new rows are learned whole."""

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
    """A prior after `add_lora` as the trainer sees it: its checkpoints hold weights and updates, for the run alone."""

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        """Write the tensors under the names that they have now; transformers refuses the shared ones, which it does not know."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self.prior, str(Path(folder, "model.safetensors")))


def add_lora(prior: PreTrainedModel, layout: SequenceLayout, *, rank: int, seed: int = 0) -> Any:
    """Put updates of this rank beside every linear layer of an extended prior, and freeze all but them and the rows after text.

    The prior is changed in place and reads and answers as before; what is returned is for `merge_lora`.

    Raises:
        ValueError: where peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("key 'lora_rank' needs peft, which is not installed: pip install 'tok2img[lora]'") from error
    new_ids = list(range(layout.text_vocab_size, layout.vocab_size))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        trainable_token_indices=dict.fromkeys(names_of_tables(prior), new_ids),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in prior.modules()),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers for a name that has a new one
        torch.manual_seed(seed)
        return get_peft_model(prior, config)


def names_of_tables(prior: PreTrainedModel) -> list[str]:
    """The last names of the modules with a row for each id: the embeddings, and the head where it is not tied to them."""
    embeddings: Any = prior.get_input_embeddings()
    head: Any = prior.get_output_embeddings()
    tables = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    return [name.rpartition(".")[2] for name, module in prior.named_modules() if any(module is each for each in tables)]


def merge_lora(adapted: Any) -> None:
    """Add the updates to the weights they stand beside: the prior given to `add_lora` is a plain model again."""
    adapted.merge_and_unload().requires_grad_(True)
