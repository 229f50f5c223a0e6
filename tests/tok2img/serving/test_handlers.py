"""Tests of the web page's handlers, without a page."""

import numpy as np
import pytest
from PIL import Image

from tok2img.data.images import load_pixels
from tok2img.generation.captioning import CAPTION_KEY
from tok2img.pipelines.image_to_text import ImageToTextPipeline
from tok2img.serving.handlers import MAX_STAGES, Handlers, format_guidance, parse_guidance, parse_seed, stream_results
from tokenizers_vq.images.processing import images_from_pixels


def same(pil_images, others) -> bool:
    return len(pil_images) == len(others) and all(map(np.array_equal, pil_images, others))


def last(results):
    return list(results)[-1]


@pytest.fixture(params=["pipeline", "stage_pipeline"])
def handlers(request) -> Handlers:
    return Handlers(request.getfixturevalue(request.param))


@pytest.fixture
def file(pil_images, tmp_path) -> str:
    """An image of another size and shape than the model's."""
    path = tmp_path / "wide.png"
    pil_images[0].convert("RGB").resize((50, 30)).save(path)
    return str(path)


def test_generate_returns_the_images_of_the_pipeline(handlers):
    images, seed = last(handlers.generate("a red disc", 3, seed="7"))
    assert seed == "7" and same(images, handlers.pipeline("a red disc", 3, seed=7).images)


def test_generate_with_the_returned_seed_repeats_the_images(handlers):
    images, seed = last(handlers.generate("a red disc", 2))
    assert same(last(handlers.generate("a red disc", 2, seed=seed))[0], images)
    assert last(handlers.generate("a red disc", 2))[1] != seed


def test_generate_passes_its_settings_to_the_pipeline(handlers):
    settings = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "best_of": 2}
    images, _ = last(handlers.generate("a dog", 2, guidance_scale="1, 4", seed="1", **settings))
    assert same(images, handlers.pipeline("a dog", 2, guidance_scale=(1, 4), seed=1, **settings).images)


def test_generate_with_coarse_to_fine_codes_yields_an_image_per_code(stage_pipeline):
    results = [images for images, _ in Handlers(stage_pipeline).generate("a dog", 2, seed="1")]
    assert len(results) == stage_pipeline.processor.layout.num_codes
    codes = stage_pipeline("a dog", 2, seed=1).codes
    for number, images in enumerate(results, start=1):
        assert same(images, stage_pipeline.processor.decode_images(codes[:, :number]))


def test_generate_with_a_grid_of_codes_yields_once(pipeline):
    assert len(list(Handlers(pipeline).generate("a dog", 2, seed="1"))) == 1


def test_generate_with_an_image_keeps_its_first_codes(handlers, file):
    processor = handlers.pipeline.processor
    (preview,) = handlers.preprocessed_preview(file)
    for keep in (0, 2, processor.layout.num_codes - 1, processor.layout.num_codes):
        images, _ = last(handlers.generate("a red disc", 3, seed="5", image=file, keep=keep))
        assert same(images, handlers.pipeline("a red disc", 3, seed=5, image=preview, keep=keep).images)


def test_preprocessed_preview_is_the_input_of_the_tokenizer(handlers, file):
    tokenizer = handlers.pipeline.processor.image_tokenizer
    (preview,) = handlers.preprocessed_preview(file)
    assert same([preview], images_from_pixels(load_pixels([file], tokenizer)))
    assert preview.size == (tokenizer.config.image_size,) * 2


def test_codes_returns_codes_and_labeled_reconstructions(handlers, file):
    processor = handlers.pipeline.processor
    ((stages, text),) = handlers.codes(file)
    codes = processor.encode_images([file])
    assert text == " ".join(map(str, codes[0].tolist()))
    images, labels = zip(*stages, strict=True)
    assert 1 <= len(stages) <= MAX_STAGES and len(set(labels)) == len(labels)
    assert same(images[-1:], processor.decode_images(codes))


def test_caption_returns_the_caption_of_the_pipeline(pipeline, file):
    setattr(pipeline.prior.generation_config, CAPTION_KEY, True)
    (text,) = Handlers(pipeline).caption(file)
    assert text == ImageToTextPipeline(pipeline.prior, pipeline.processor)([file])[0]


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda a: a.generate("  "), "the caption is empty"),
        (
            lambda a: a.generate("a dog", guidance_scale="strong"),
            "guidance must be a number, or several .* got 'strong'",
        ),
        (lambda a: a.generate("a dog", seed="-1"), "seed must be an integer of at least 0, got '-1'"),
        (lambda a: a.generate("a dog", temperature=-1), "temperature"),
        (lambda a: a.generate("a dog", keep=1), "no image: choose a file"),
        (lambda a: a.preprocessed_preview(None), "no image: choose a file"),
        (lambda a: a.codes(__file__), "not an image"),
        (lambda a: a.caption(None), "not learned to caption"),
    ],
)
def test_handlers_with_invalid_input_raise_value_error(pipeline, ask, complaint):
    with pytest.raises(ValueError, match=complaint):
        list(ask(Handlers(pipeline)))


def test_parse_guidance_reads_numbers_and_schedules():
    assert [parse_guidance(text) for text in ("", " ", "3", "1, 4.5,")] == [None, None, 3.0, [1.0, 4.5]]
    assert [format_guidance(guidance) for guidance in (2.5, (1.0, 4.0))] == ["2.5", "1, 4"]


def test_parse_seed_reads_a_number_or_draws_one():
    assert parse_seed(" 12 ") == 12 and parse_seed("") != parse_seed("")


def test_stream_results_yields_intermediate_results():
    def work(put):
        put(1)
        put(2)
        return 3

    assert list(stream_results(work)) == [1, 2, 3]


def test_stream_results_raises_the_error_of_the_work():
    def work(put):
        put(1)
        raise ValueError("too much")

    results = stream_results(work)
    assert next(results) == 1
    with pytest.raises(ValueError, match="too much"):
        next(results)


def test_preprocessed_preview_applies_exif_orientation(pipeline, tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "side.png", exif=exif)
    (preview,) = Handlers(pipeline).preprocessed_preview(str(tmp_path / "side.png"))
    top, bottom = (np.asarray(preview.convert("L"))[row].mean() for row in (0, -1))
    assert top > bottom + 100
