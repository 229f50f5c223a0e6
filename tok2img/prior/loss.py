"""The loss that trains a prior on sequences of a layout, the same however batches and processes share the rows of a step."""

from collections.abc import Callable, Sequence
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
from .compiled_blocks import CompiledLayers
from .model import caption_logits, check_fits, code_logits, last_hidden_state, segment_logits
from .position_embeddings import AxialPositionEmbeddings

IMAGE_WEIGHT = 7.0  # against 1 for text, as in DALL-E (Ramesh et al. 2021, section 2.2)


@dataclass
class PriorOutput(ModelOutput):
    """`loss`, and its parts in nats a token as `metrics`."""

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class PriorWithLoss(ModelWithLoss):
    """A prior as the trainer sees it: tokens in, loss out. The model inside stays as transformers made it.

    Args:
        prior: a causal language model that fits the layout.
        caption_dropout: share of training captions that are hidden, without which guidance has nothing to compare with.
        image_loss_weight: weight of the mean loss of image codes against 1 for text.
        image_to_text_fraction: share of the training rows that learn to caption: the image comes first, and the text after it is all they learn.
        places: what the places of codes add to their embeddings; it learns too.
        compile: run the layers through `torch.compile` in training, see `CompiledLayers`.
    """

    inner_name = "prior"

    @property
    def _no_split_modules(self) -> Any:
        """What accelerate shares among processes layer by layer."""
        return self.prior._no_split_modules

    def __init__(
        self,
        prior: PreTrainedModel,
        layout: SequenceLayout,
        *,
        caption_dropout: float = 0.1,
        image_loss_weight: float = IMAGE_WEIGHT,
        image_to_text_fraction: float = 0.0,
        places: AxialPositionEmbeddings | None = None,
        compile: bool = False,
    ):
        super().__init__()
        check_fits(prior, layout)
        self.prior, self.layout, self.places = prior, layout, places
        self.caption_dropout, self.image_loss_weight, self.image_to_text_fraction = (
            caption_dropout,
            image_loss_weight,
            image_to_text_fraction,
        )
        self.compiled = CompiledLayers(prior) if compile else None

    def train(self, mode: bool = True) -> Self:
        """As of any module; layers run compiled in training alone."""
        if self.compiled:
            self.compiled.use(mode)
        return super().train(mode)

    def forward(
        self,
        text_ids: Tensor,
        image_codes: Tensor,
        num_captioning: int | None = None,
        mean_tokens: Tensor | None = None,
    ) -> PriorOutput:
        """Text `b t` and codes `b n` -> the weighted loss; each segment's own head rows only, which is the masked loss exactly.

        In training the first rows of a batch, whose order is random, learn to caption and the others to draw; in eval mode all do both.

        Args:
            num_captioning, mean_tokens: what `prepare` adds; a training batch without them is a step of its own.
        """
        if self.training and mean_tokens is None:
            return self(**self.prepare([{"text_ids": text_ids, "image_codes": image_codes}])[0])
        text_ids, layout = text_ids.long(), self.layout
        num = num_captioning if num_captioning is not None else len(text_ids) if self.image_to_text_fraction else 0
        drawing = slice(num, None) if self.training else slice(None)
        drawn_text, drawn_codes = text_ids[drawing], image_codes[drawing]
        sequences = layout.sequence(drawn_text, drawn_codes)
        if num:
            sequences = torch.cat([sequences, layout.caption_sequence(text_ids[:num], image_codes[:num])])
        hidden = last_hidden_state(self.prior, sequences[:, :-1], self.added(len(drawn_text), num))
        losses, metrics = [], {}
        share = num / len(text_ids) if self.training else self.image_to_text_fraction
        of_drawing, of_captioning = (None, None) if mean_tokens is None else mean_tokens
        if len(drawn_text):
            loss, metrics = self.drawing_loss(hidden[: len(drawn_text)], drawn_text, drawn_codes, of_drawing)
            losses.append((1 - share) * loss)
        if num:
            metrics["caption_loss"] = self.captioning_loss(hidden[len(drawn_text) :], text_ids[:num], of_captioning)
            losses.append(share * metrics["caption_loss"])
        return PriorOutput(
            loss=torch.stack(losses).sum(), metrics={name: part.detach() for name, part in metrics.items()}
        )

    def added(self, num_drawing: int, num_captioning: int) -> Tensor | None:
        """What places add to the embeddings of all positions but the last, `b s d`, of rows of either direction; None without places."""
        if self.places is None:
            return None
        vectors = self.places()
        drawing = F.pad(vectors[:-1], (0, 0, self.layout.prompt_length, 0)).expand(num_drawing, -1, -1)
        captioning = F.pad(vectors, (0, 0, 1, self.layout.text_length)).expand(num_captioning, -1, -1)
        return torch.cat([drawing, captioning])

    def prepare(
        self, batches: Sequence[dict[str, Any]], chance: Callable[[int], Tensor] = torch.rand
    ) -> list[dict[str, Any]]:
        """The batches of one training step, with what chance decides about them and with what their losses have to be divided by.

        Some captions are hidden, `num_captioning` rows learn to caption, and `mean_tokens` says how many text tokens, for drawing and for
        captioning, a batch of this step has on average in all processes: the mean of the batches' losses is then that of all rows at once.

        Args:
            chance: makes so many random numbers from 0 to 1, the same in all processes.
        """
        sizes = [len(batch["text_ids"]) for batch in batches]
        if not sizes:
            return []
        draws = chance(1 + get_world_size() * sum(sizes)).to(batches[0]["text_ids"].device)
        prepared, counts = [], []
        for batch, hidden in zip(batches, local_slices(draws[1:], sizes), strict=True):
            num = self.num_captioning(len(hidden), draws[0])
            text_ids = self.hide(batch["text_ids"].long(), hidden, num_captioning=num)
            prepared.append(batch | {"text_ids": text_ids, "num_captioning": num})
            labels = self.drawing_labels(text_ids[num:]), self.captioning_labels(text_ids[:num])
            counts.append(torch.stack([(each >= 0).sum() for each in labels]))
        in_all = all_reduce_sum(torch.stack(counts).sum(dim=0))
        mean_tokens = in_all.clamp_min(1) / (get_world_size() * len(batches))
        return [batch | {"mean_tokens": mean_tokens} for batch in prepared]

    def num_captioning(self, num_rows: int, draw: Tensor) -> int:
        """How many of the rows learn to caption in training: the share of them, rounded up or down by a `draw` from 0 to 1."""
        return int(self.image_to_text_fraction * num_rows + draw.item()) if self.image_to_text_fraction else 0

    def hide(self, text_ids: Tensor, draws: Tensor, *, num_captioning: int = 0) -> Tensor:
        """Caption dropout by draws `b` from 0 to 1: text `b t` with some captions all [PAD], though not the first, which are learned."""
        hidden = draws < self.caption_dropout
        hidden[:num_captioning] = False
        return text_ids.masked_fill(hidden[:, None], self.layout.pad_id)

    def drawing_loss(
        self, hidden: Tensor, text_ids: Tensor, codes: Tensor, num_tokens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of text `b t` and the codes `b n` after it, given states `b s d` of all positions but the last; and its two parts."""
        text, image = self.layout.text, self.layout.image
        states, labels = learned(hidden[:, : text.length], self.drawing_labels(text_ids))
        text_logits = segment_logits(self.prior, states, text.offset, text.num_ids)
        text_loss = mean_loss(text_logits, labels, num_tokens)
        image_logits = code_logits(self.prior, hidden[:, self.layout.prompt_length - 1 :], image)
        image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), codes.long().flatten())
        loss = (text_loss + self.image_loss_weight * image_loss) / (1 + self.image_loss_weight)
        return loss, {"text_loss": text_loss, "image_loss": image_loss}

    def captioning_loss(self, hidden: Tensor, text_ids: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Of text `b t` after an image, given states `b s d` of all positions but the last."""
        states = hidden[:, self.layout.caption_prompt_length - 1 :]
        states, labels = learned(states, self.captioning_labels(text_ids))
        return mean_loss(caption_logits(self.prior, states, self.layout), labels, num_tokens)

    def drawing_labels(self, text_ids: Tensor) -> Tensor:
        """What is learned of text `b t` before an image: all but [PAD]."""
        return text_ids.masked_fill(text_ids == self.layout.pad_id, -100)

    def captioning_labels(self, text_ids: Tensor) -> Tensor:
        """What is learned of text `b t` after an image: all up to and including the first [PAD]."""
        is_pad = text_ids == self.layout.pad_id
        return text_ids.masked_fill(is_pad & (is_pad.cumsum(dim=1) > 1), -100)


def learned(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of states `b s d` and labels `b s` those whose label is not -100, as one row, where to know how many costs nothing: on a CPU."""
    if not can_read_without_sync(labels):
        return hidden, labels
    counts = labels >= 0
    return hidden[counts][None], labels[counts][None]


def mean_loss(logits: Tensor, labels: Tensor, num_labels: Tensor | None = None) -> Tensor:
    """Cross entropy of `b n k` and labels `b n`, a mean over those that are not -100, or the sum over another number; 0 where none is."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return loss / ((labels >= 0).sum().clamp_min(1) if num_labels is None else num_labels)
