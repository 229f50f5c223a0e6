import numpy as np
import pytest
import torch

from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.processor import IGNORED_LABEL, Tok2ImgProcessor
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tokenizers_vq.auto import load_image_tokenizer


@pytest.fixture(params=["processor", "stage_processor"])
def any_processor(request) -> Tok2ImgProcessor:
    return request.getfixturevalue(request.param)


def test_a_sequence_is_its_prompt_and_then_its_codes(any_processor, captions, pil_images):
    input_ids = any_processor(captions, pil_images)["input_ids"]
    layout = any_processor.layout
    prompt, image = input_ids[:, : layout.prompt_length], input_ids[:, layout.prompt_length :]
    assert prompt.equal(any_processor(captions)["input_ids"])
    assert layout.image.ids_to_codes(image).equal(any_processor.encode_images(pil_images))


def test_labels_leave_out_the_marks_and_nothing_else(any_processor, captions, pil_images):
    batch, layout = any_processor(captions, pil_images), any_processor.layout
    left_out = batch["labels"] == IGNORED_LABEL
    marks = torch.tensor([layout.bos_id, layout.sep_id, layout.pad_id])
    assert left_out.equal(torch.isin(batch["input_ids"], marks))
    assert batch["labels"][~left_out].equal(batch["input_ids"][~left_out])


def test_one_caption_is_a_batch_of_one(processor):
    assert processor("a dog")["input_ids"].equal(processor(["a dog"])["input_ids"])


def test_images_without_captions_have_the_empty_prompt(processor, pil_images):
    text = processor(images=pil_images)["input_ids"][:, 1 : processor.layout.prompt_length - 1]
    assert text.equal(processor.layout.null_text_ids(len(pil_images)))


def test_unequal_numbers_of_captions_and_images_are_refused(processor, pil_images):
    with pytest.raises(ValueError, match="got 2 captions for 6 images"):
        processor(["a", "b"], pil_images)


def test_captions_that_are_too_long_are_cut_and_counted(processor):
    captions = ["a dog", "a red square " * 9, "\U0001f600" * 20]
    assert processor.encode_text(captions).shape == (3, processor.layout.text_length)
    assert processor.count_truncated(captions) == 2


def test_decoded_images_are_those_of_the_tokenizer(any_processor, pil_images, images):
    codes = any_processor.encode_images(pil_images)
    expected = any_processor.image_tokenizer.decode(codes).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (np.stack([np.asarray(image) for image in any_processor.decode_images(codes)]) == expected).all()


def test_one_image_codes_as_it_does_in_a_batch(any_processor, pil_images):
    alone = torch.cat([any_processor.encode_images([image]) for image in pil_images])
    assert alone.equal(any_processor.encode_images(pil_images))


def test_a_bad_image_is_named_by_its_row(processor, pil_images):
    with pytest.raises(ValueError, match="row 12: .*not an image"):
        processor.encode_images([pil_images[0], b"no image at all"], rows=[11, 12])


def test_the_fingerprint_survives_saving_and_loading_from_any_folder(any_processor, tmp_path):
    first, second = tmp_path / "one", tmp_path / "other" / "two"
    any_processor.save_pretrained(first)
    again = Tok2ImgProcessor.from_pretrained(first)
    again.save_pretrained(second)
    assert any_processor.fingerprint() == again.fingerprint() == Tok2ImgProcessor.from_pretrained(second).fingerprint()


def test_the_fingerprint_does_not_depend_on_training_mode(any_processor):
    before = any_processor.fingerprint()
    any_processor.image_tokenizer.train()
    assert any_processor.fingerprint() == before


def test_every_tensor_changes_the_fingerprint(any_processor):
    seen = {any_processor.fingerprint()}
    tensors = [each for each in any_processor.image_tokenizer.state_dict().values() if each.numel()]
    for tensor in tensors:
        flat = tensor.view(-1)
        flat[-1] = ~flat[-1] if tensor.dtype == torch.bool else flat[-1] + 1
        seen.add(any_processor.fingerprint())
    assert len(seen) == len(tensors) + 1


def test_a_setting_changes_the_fingerprint(processor):
    before = processor.fingerprint()
    processor.image_tokenizer.config.pixel_mean += 0.01
    assert processor.fingerprint() != before


def test_searching_in_bfloat16_changes_the_fingerprint_and_the_default_does_not(stage_processor):
    config = stage_processor.image_tokenizer.config
    default = stage_processor.fingerprint()
    config.encode_dtype = "bfloat16"
    assert stage_processor.fingerprint() != default
    del config.encode_dtype  # as in files from before there was the setting
    assert stage_processor.fingerprint() == default


def test_searching_for_codes_changes_the_fingerprint_and_the_default_does_not(processor):
    config = processor.image_tokenizer.config
    default = processor.fingerprint()
    config.search_steps = 1
    assert processor.fingerprint() != default
    del config.search_steps
    assert processor.fingerprint() == default


def test_a_setting_that_is_none_is_a_setting(processor):
    before = processor.fingerprint()
    processor.image_tokenizer.config.unheard_of = None
    assert processor.fingerprint() != before


def test_the_type_of_the_weights_changes_the_fingerprint(processor):
    before = processor.fingerprint()
    processor.image_tokenizer.encoder.half()
    assert processor.fingerprint() != before


def test_the_text_tokenizer_and_the_text_length_change_the_fingerprint(processor, tiny_vqvae, text_tokenizer):
    other_text = SubwordTokenizer.train_bpe(["quite different words"], vocab_size=text_tokenizer.vocab_size)
    others = [
        Tok2ImgProcessor.build(tiny_vqvae, other_text, text_length=6),
        Tok2ImgProcessor.build(tiny_vqvae, text_tokenizer, text_length=7),
    ]
    assert len({each.fingerprint() for each in (processor, *others)}) == 3


@pytest.mark.parametrize(
    "change", [{"text_vocab_size": 5}, {"num_codes": 9}, {"codebook_size": 2}, {"positions_per_codebook": (1, 3)}]
)
def test_a_layout_that_does_not_fit_is_refused(processor, tiny_vqvae, text_tokenizer, change):
    fitting = vars(processor.layout)
    with pytest.raises(ValueError, match="these tokenizers need"):
        Tok2ImgProcessor(tiny_vqvae, text_tokenizer, SequenceLayout(**(fitting | change)))


def test_a_loaded_processor_gives_the_same_sequences(any_processor, captions, pil_images, tmp_path):
    any_processor.save_pretrained(tmp_path)
    again = Tok2ImgProcessor.from_pretrained(tmp_path)
    assert again(captions, pil_images)["input_ids"].equal(any_processor(captions, pil_images)["input_ids"])


def test_a_folder_that_holds_no_image_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        load_image_tokenizer(tmp_path)


def test_a_language_model_is_no_image_tokenizer(tmp_path):
    from tok2img.prior.model import build_prior

    build_prior(SequenceLayout(11, 3, 4, 6), depth=1).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="not an image tokenizer"):
        load_image_tokenizer(tmp_path)
