"""Training loss of a prior on the sequences of a layout.

The loss and its gradients do not depend on how micro-batches and processes divide the rows of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from tokenizers_vq import ModelWithLoss
from tokenizers_vq.distributed import all_reduce_sum, get_world_size, local_slices
from tokenizers_vq.validation import can_read_without_sync

from ..tokenization.layout import SequenceLayout
from .compiled_blocks import CompiledBlocks
from .model import caption_logits, check_fits, code_logits, last_hidden_state, segment_logits
from .position_embeddings import AxialPositionEmbeddings

IMAGE_LOSS_WEIGHT = 7.0  # against 1 for text, as in DALL-E (Ramesh et al. 2021, section 2.2)
IGNORE_INDEX = -100  # label of positions without loss; torch's default


@dataclass
class PriorOutput(ModelOutput):
    """Output of `PriorWithLoss`.

    Attributes:
        loss: The weighted loss, a scalar.
        metrics: Its terms in nats per token: `text_loss`, `image_loss`, `caption_loss`.
    """

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class PriorWithLoss(ModelWithLoss):
    """A prior with its training loss: tokens in, loss out. The model inside stays unmodified.

    Args:
        prior: A causal language model that fits the layout.
        layout: The layout of its sequences.
        caption_dropout: Fraction of captions replaced by the empty caption in training; needed for
            classifier-free guidance.
        image_loss_weight: Weight of the mean loss of image codes, against 1 for text.
        image_to_text_fraction: Fraction of the training rows that learn to caption. Their sequence starts
            with the image, and only the text after it carries loss.
        position_embeddings: Embeddings added to those of image codes, trained with the prior.
        compile: Run the blocks through `torch.compile` in training, see `CompiledBlocks`.

    Raises:
        ValueError: If the prior does not fit the layout.

    Example:
        >>> import torch
        >>> from tok2img import PriorWithLoss, SequenceLayout, build_prior
        >>> layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
        >>> model = PriorWithLoss(build_prior(layout, depth=1), layout).eval()
        >>> output = model(torch.tensor([[1, 5, 10]]), torch.tensor([[0, 5, 2, 3]]))
        >>> sorted(output.metrics)
        ['image_loss', 'text_loss']
    """

    inner_name = "prior"

    @property
    def _no_split_modules(self) -> Any:
        """Names of the module classes that accelerate's FSDP wraps one by one."""
        return self.prior._no_split_modules

    def __init__(
        self,
        prior: PreTrainedModel,
        layout: SequenceLayout,
        *,
        caption_dropout: float = 0.1,
        image_loss_weight: float = IMAGE_LOSS_WEIGHT,
        image_to_text_fraction: float = 0.0,
        position_embeddings: AxialPositionEmbeddings | None = None,
        compile: bool = False,
    ):
        super().__init__()
        check_fits(prior, layout)
        self.prior, self.layout, self.position_embeddings = prior, layout, position_embeddings
        self.caption_dropout = caption_dropout
        self.image_loss_weight = image_loss_weight
        self.image_to_text_fraction = image_to_text_fraction
        self.compiled_blocks = CompiledBlocks(prior) if compile else None

    def train(self, mode: bool = True) -> Self:
        """Set training or eval mode. Compiled blocks are used in training only."""
        if self.compiled_blocks:
            self.compiled_blocks.use(mode)
        return super().train(mode)

    def forward(
        self,
        text_ids: Tensor,
        image_codes: Tensor,
        num_captioning: int | None = None,
        mean_tokens: Tensor | None = None,
    ) -> PriorOutput:
        """Compute the weighted loss.

        Each segment is multiplied with its own head rows only. This equals the cross entropy over all ids
        with the others masked, at a fraction of the cost. In training the first `num_captioning` rows learn
        to caption and the others to generate images; row order is random. In eval mode all rows do both.

        Args:
            text_ids: Text ids, `b t`.
            image_codes: Image codes, `b n`.
            num_captioning: Number of rows that learn to caption, from `prepare_step`.
            mean_tokens: Divisors of the text losses, `2`, from `prepare_step`. A training batch without them
                is treated as a step of its own.

        Returns:
            The loss and its terms.
        """
        if self.training and mean_tokens is None:
            return self(**self.prepare_step([{"text_ids": text_ids, "image_codes": image_codes}])[0])
        text_ids, layout = text_ids.long(), self.layout
        num = num_captioning if num_captioning is not None else len(text_ids) if self.image_to_text_fraction else 0
        text_to_image = slice(num, None) if self.training else slice(None)
        image_text_ids, codes = text_ids[text_to_image], image_codes[text_to_image]
        sequences = layout.sequence(image_text_ids, codes)
        if num:
            sequences = torch.cat([sequences, layout.caption_sequence(text_ids[:num], image_codes[:num])])
        # One pass for both directions: their sequences have the same length.
        hidden = last_hidden_state(self.prior, sequences[:, :-1], self.added_embeddings(len(codes), num))
        losses, metrics = [], {}
        fraction = num / len(text_ids) if self.training else self.image_to_text_fraction
        text_tokens, caption_tokens = (None, None) if mean_tokens is None else mean_tokens
        if len(codes):
            loss, metrics = self.text_to_image_loss(hidden[: len(codes)], image_text_ids, codes, text_tokens)
            losses.append((1 - fraction) * loss)
        if num:
            metrics["caption_loss"] = self.image_to_text_loss(hidden[len(codes) :], text_ids[:num], caption_tokens)
            losses.append(fraction * metrics["caption_loss"])
        return PriorOutput(
            loss=torch.stack(losses).sum(), metrics={name: term.detach() for name, term in metrics.items()}
        )

    def prepare_step(
        self, batches: list[dict[str, Any]], uniform: Callable[..., Tensor] = torch.rand
    ) -> list[dict[str, Any]]:
        """Make the random decisions of one training step and count its tokens.

        The mean of the batches' losses over all processes is then the loss of all rows in one batch.

        Args:
            batches: This process's micro-batches, with `text_ids` `b t` and `image_codes` `b n`.
            uniform: Draws that many numbers from [0, 1); the same in all processes.

        Returns:
            The batches with some captions dropped, `num_captioning`, and `mean_tokens`: how many text tokens
            a micro-batch has on average over all processes, in either direction.
        """
        sizes = [len(batch["text_ids"]) for batch in batches]
        if not sizes:
            return []
        # Every process draws the numbers of all rows and uses its own: no row's fate depends on the split.
        uniforms = uniform(1 + get_world_size() * sum(sizes)).to(batches[0]["text_ids"].device)
        prepared, counts = [], []
        for batch, row_uniforms in zip(batches, local_slices(uniforms[1:], sizes), strict=True):
            num = self.sample_num_captioning(len(row_uniforms), uniforms[0])
            text_ids = self.drop_captions(batch["text_ids"].long(), row_uniforms, num_captioning=num)
            prepared.append(batch | {"text_ids": text_ids, "num_captioning": num})
            labels = self.text_labels(text_ids[num:]), self.caption_labels(text_ids[:num])
            counts.append(torch.stack([(each >= 0).sum() for each in labels]))
        total = all_reduce_sum(torch.stack(counts).sum(dim=0))
        mean_tokens = total.clamp_min(1) / (get_world_size() * len(batches))
        return [batch | {"mean_tokens": mean_tokens} for batch in prepared]

    def sample_num_captioning(self, num_rows: int, uniform: Tensor) -> int:
        """Sample how many of a batch's rows learn to caption: their expected number, rounded up or down.

        Args:
            num_rows: Number of rows.
            uniform: A number from [0, 1).
        """
        # Without the fraction reading `uniform` would cost a GPU synchronization for nothing.
        return int(self.image_to_text_fraction * num_rows + uniform.item()) if self.image_to_text_fraction else 0

    def drop_captions(self, text_ids: Tensor, uniforms: Tensor, *, num_captioning: int = 0) -> Tensor:
        """Replace some captions by the empty caption (Ho & Salimans 2022).

        Args:
            text_ids: Text ids, `b t`.
            uniforms: A number from [0, 1) per row, `b`.
            num_captioning: Number of first rows to leave alone, because their caption is the target.

        Returns:
            Text ids, `b t`.
        """
        is_dropped = uniforms < self.caption_dropout
        is_dropped[:num_captioning] = False
        return text_ids.masked_fill(is_dropped[:, None], self.layout.pad_id)

    def added_embeddings(self, num_text_to_image: int, num_captioning: int) -> Tensor | None:
        """Return the position embeddings of every input position, `b s d`; None if the prior has none.

        Args:
            num_text_to_image: Number of rows with text before the image.
            num_captioning: Number of rows with the image first, which follow them.
        """
        if self.position_embeddings is None:
            return None
        vectors = self.position_embeddings()
        # The last code is not an input when the image ends the sequence.
        text_to_image = F.pad(vectors[:-1], (0, 0, self.layout.prompt_length, 0)).expand(num_text_to_image, -1, -1)
        captioning = F.pad(vectors, (0, 0, 1, self.layout.text_length)).expand(num_captioning, -1, -1)
        return torch.cat([text_to_image, captioning])

    def text_to_image_loss(
        self, hidden: Tensor, text_ids: Tensor, codes: Tensor, num_tokens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of sequences with text before the image.

        Args:
            hidden: Last hidden states of all positions but the last, `b s d`.
            text_ids: Text ids, `b t`.
            codes: Image codes, `b n`.
            num_tokens: Divisor of the text loss; the number of text tokens if None.

        Returns:
            The weighted loss, and its terms `text_loss` and `image_loss`.
        """
        text, image = self.layout.text, self.layout.image
        states, labels = select_labeled(hidden[:, : text.length], self.text_labels(text_ids))
        text_logits = segment_logits(self.prior, states, text.offset, text.num_ids)
        text_loss = mean_cross_entropy(text_logits, labels, num_tokens)
        image_logits = code_logits(self.prior, hidden[:, self.layout.prompt_length - 1 :], image)
        image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), codes.long().flatten())
        loss = (text_loss + self.image_loss_weight * image_loss) / (1 + self.image_loss_weight)
        return loss, {"text_loss": text_loss, "image_loss": image_loss}

    def image_to_text_loss(self, hidden: Tensor, text_ids: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Compute the loss of captions after their image.

        Args:
            hidden: Last hidden states of all positions but the last, `b s d`.
            text_ids: Text ids, `b t`.
            num_tokens: Divisor of the loss; the number of labels if None.
        """
        states = hidden[:, self.layout.caption_prompt_length - 1 :]
        states, labels = select_labeled(states, self.caption_labels(text_ids))
        return mean_cross_entropy(caption_logits(self.prior, states, self.layout), labels, num_tokens)

    def text_labels(self, text_ids: Tensor) -> Tensor:
        """Return the labels of text before an image, `b t`: [PAD] carries no loss."""
        return text_ids.masked_fill(text_ids == self.layout.pad_id, IGNORE_INDEX)

    def caption_labels(self, text_ids: Tensor) -> Tensor:
        """Return the labels of text after an image, `b t`: the first [PAD] ends a caption and carries loss."""
        is_pad = text_ids == self.layout.pad_id
        return text_ids.masked_fill(is_pad & (is_pad.cumsum(dim=1) > 1), IGNORE_INDEX)


def select_labeled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Drop positions without a label, which saves their product with the head.

    Only on a CPU, where counting them needs no synchronization.

    Args:
        hidden: Hidden states, `b s d`.
        labels: Labels, `b s`.

    Returns:
        Hidden states `1 m d` and labels `1 m`; on other devices the inputs.
    """
    if not can_read_without_sync(labels):
        return hidden, labels
    has_label = labels >= 0
    return hidden[has_label][None], labels[has_label][None]


def mean_cross_entropy(logits: Tensor, labels: Tensor, num_labels: Tensor | None = None) -> Tensor:
    """Compute the cross entropy per label, 0 if there is no label.

    Args:
        logits: Logits, `b s v`.
        labels: Labels, `b s`; those of -100 carry no loss.
        num_labels: Divisor of the summed loss; the number of labels if None.
    """
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return loss / ((labels >= 0).sum().clamp_min(1) if num_labels is None else num_labels)
