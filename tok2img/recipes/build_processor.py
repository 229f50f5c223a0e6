"""Build the processor of a run: image tokenizer, text tokenizer and layout."""

from collections.abc import Iterable
from itertools import islice

from tokenizers_vq import DiscreteTokenizer
from tokenizers_vq.auto import load_image_tokenizer

from ..device import to_device
from ..prior.from_language_model import base_vocab_size
from ..tokenization.processor import Tok2ImgProcessor
from ..tokenization.span_text_tokenizer import load_text_tokenizer
from ..tokenization.text_tokenizer import SubwordTokenizer, TextTokenizer, ValidCaptions
from ..tokenization.token_dataset import ROWS_PER_SHARD

MAX_TEXT_LENGTH = 64


def build_processor(
    captions: Iterable[object],
    image_tokenizer: DiscreteTokenizer | str = "",
    *,
    text_tokenizer: str = "",
    base_model: str = "",
    init_from: str = "",
    vocab_size: int = 4096,
    text_length: int = 0,
    beam_size: int = 0,
    search_steps: int = 0,
) -> Tok2ImgProcessor:
    """Build the processor for a data set, on the accelerator if there is one.

    Args:
        captions: Captions of the data set, iterated several times. Entries that are not text are skipped.
        image_tokenizer: Image tokenizer, or its folder.
        text_tokenizer: Folder or hub name of a text tokenizer. Empty = the tokenizer of `base_model`, or
            BPE trained on the captions.
        base_model: Pretrained language model that becomes the prior. Text keeps as many ids as its vocabulary has.
        init_from: Folder of a trained model whose processor is taken as it is, instead of all of the above.
        vocab_size: Vocabulary size of the BPE.
        text_length: Text tokens kept of a caption. 0 = those of the longest caption, at most 64.
        beam_size: Beam size for VQ-DRAW codes. 0 = the tokenizer's default.
        search_steps: Steps of latent optimization for VQ-VAE codes. 0 = the tokenizer's default.

    Raises:
        ValueError: If the parts do not fit together, or the tokenizer does not search in that way.
    """
    if init_from:
        processor = Tok2ImgProcessor.from_pretrained(init_from)
        set_encode_search(processor.image_tokenizer, beam_size=beam_size, search_steps=search_steps)
        to_device(processor.image_tokenizer)
        return processor
    if isinstance(image_tokenizer, str):
        image_tokenizer = load_image_tokenizer(image_tokenizer)
    set_encode_search(image_tokenizer, beam_size=beam_size, search_steps=search_steps)
    name = text_tokenizer or base_model
    given = load_text_tokenizer(name) if name else None
    text_vocab_size = base_vocab_size(base_model) if base_model else 0
    if given is not None and base_model and given.vocab_size > text_vocab_size:
        raise ValueError(
            f"the text tokenizer in {name} has {given.vocab_size} ids, but the language model in {base_model} has "
            f"{text_vocab_size}: give the one that it was trained with"
        )
    text, length = fit_text_tokenizer(
        ValidCaptions(captions), text_tokenizer=given, vocab_size=vocab_size, text_length=text_length
    )
    return Tok2ImgProcessor.build(to_device(image_tokenizer), text, text_length=length, text_vocab_size=text_vocab_size)


def set_encode_search(image_tokenizer: DiscreteTokenizer, **widths: int) -> None:
    """Set how far a tokenizer searches for codes when a data set is tokenized.

    Args:
        image_tokenizer: Tokenizer whose config is changed.
        widths: `beam_size` and `search_steps`. 0 keeps the value of the config.

    Raises:
        ValueError: For a negative number, and for a search that this kind of tokenizer does not have.
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
    """Return a text tokenizer for captions, and the text length that holds them.

    Args:
        captions: Captions, iterated several times, a shard of them in memory.
        text_tokenizer: Tokenizer to use. None = train BPE on the captions.
        vocab_size: Vocabulary size of the BPE.
        text_length: Text length. 0 = tokens of the longest caption, at most 64.
    """
    text_tokenizer = text_tokenizer or SubwordTokenizer.train_bpe(captions, vocab_size=vocab_size)
    if text_length:
        return text_tokenizer, text_length
    waiting, longest = iter(captions), 1
    while some := set(islice(waiting, ROWS_PER_SHARD)):
        longest = max(longest, *text_tokenizer.lengths(sorted(some), max_length=MAX_TEXT_LENGTH))
    return text_tokenizer, min(MAX_TEXT_LENGTH, text_tokenizer.max_ids, longest)
