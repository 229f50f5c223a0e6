"""Build the processor that a recipe describes."""

from collections.abc import Iterable
from itertools import islice

from tokenizers_vq import DiscreteTokenizer

from ..device import to_device
from ..prior.from_language_model import base_vocab_size
from ..tokenization.processor import Tok2ImgProcessor
from ..tokenization.span_text_tokenizer import load_text_tokenizer
from ..tokenization.text_tokenizer import SubwordTokenizer, TextTokenizer, ValidCaptions
from ..tokenization.token_dataset import ROWS_PER_SHARD

MAX_TEXT_LENGTH = 64


def build_processor(
    captions: Iterable[object],
    image_tokenizer: DiscreteTokenizer,
    *,
    text_tokenizer: str = "",
    base: str = "",
    vocab_size: int = 4096,
    text_length: int = 0,
) -> Tok2ImgProcessor:
    """A processor for these captions, on a GPU where there is one.

    Args:
        captions: looked at several times; those that are no text are passed over.
        text_tokenizer: a saved one; without it that of the base, and without a base BPE learned from the captions.
        base: a pretrained language model that is to become the prior: text keeps as many ids as it has rows for.
    """
    name = text_tokenizer or base
    given = load_text_tokenizer(name) if name else None
    rows = base_vocab_size(base) if base else 0
    if given is not None and base and given.vocab_size > rows:
        raise ValueError(
            f"the text tokenizer in {name} has {given.vocab_size} ids, but the language model in {base} has {rows}: "
            "give the one that it was trained with"
        )
    text, length = fit_text_tokenizer(
        ValidCaptions(captions), text_tokenizer=given, vocab_size=vocab_size, text_length=text_length
    )
    return Tok2ImgProcessor.build(to_device(image_tokenizer), text, text_length=length, text_vocab_size=rows)


def set_encode_search(image_tokenizer: DiscreteTokenizer, **widths: int) -> None:
    """How far to search for codes when a data set is tokenized: `beam_size`, `search_steps`; 0 leaves what the tokenizer's config says.

    Raises:
        ValueError: for a tokenizer that does not search so, and a number below 0.
    """
    for name, width in widths.items():
        if width and not hasattr(image_tokenizer.config, name):
            raise ValueError(f"a {type(image_tokenizer).__name__} has no {name} to search with, got {width}")
        if width < 0:
            raise ValueError(f"{name} must be at least 1, or 0 for the tokenizer's own, got {width}")
        if width:
            image_tokenizer.config.update({name: width})


def fit_text_tokenizer(
    captions: Iterable[str],
    *,
    text_tokenizer: TextTokenizer | None = None,
    vocab_size: int = 4096,
    text_length: int = 0,
) -> tuple[TextTokenizer, int]:
    """A text tokenizer for these captions (BPE learned from them when none is given) and the text length that holds them.

    Args:
        captions: looked at several times, some at once.
        text_length: 0 means as many tokens as the longest caption has, 64 at most.
    """
    text_tokenizer = text_tokenizer or SubwordTokenizer.train_bpe(captions, vocab_size=vocab_size)
    if text_length:
        return text_tokenizer, text_length
    waiting, longest = iter(captions), 1
    while some := set(islice(waiting, ROWS_PER_SHARD)):
        longest = max(longest, *text_tokenizer.lengths(sorted(some), max_length=MAX_TEXT_LENGTH))
    return text_tokenizer, min(MAX_TEXT_LENGTH, text_tokenizer.max_ids, longest)
