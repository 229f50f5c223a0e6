"""What the buttons of the web page do, without a page."""

import numpy as np
import pytest
from PIL import Image

from tok2img.data.images import load_pixels
from tok2img.generation.captioning import CAPTION_KEY
from tok2img.pipelines.image_to_text import ImageToTextPipeline
from tok2img.serving.handlers import MOST_STAGES, Handlers, as_text, guidance_of, seed_of, stream_results
from tokenizers_vq.images.processing import images_from_pixels


def same(pil_images, others) -> bool:
    return len(pil_images) == len(others) and all(map(np.array_equal, pil_images, others))


def last(turns):
    return list(turns)[-1]


@pytest.fixture(params=["pipeline", "stage_pipeline"])
def answers(request) -> Handlers:
    return Handlers(request.getfixturevalue(request.param))


@pytest.fixture
def file(pil_images, tmp_path) -> str:
    """An image of another size and shape than the model's."""
    path = tmp_path / "wide.png"
    pil_images[0].convert("RGB").resize((50, 30)).save(path)
    return str(path)


def test_it_draws_what_the_pipeline_draws(answers):
    images, seed = last(answers.draw("a red disc", 3, seed="7"))
    assert seed == "7" and same(images, answers.pipeline("a red disc", 3, seed=7).images)


def test_the_seed_it_gives_draws_the_same_again(answers):
    images, seed = last(answers.draw("a red disc", 2))
    assert same(last(answers.draw("a red disc", 2, seed=seed))[0], images)
    assert last(answers.draw("a red disc", 2))[1] != seed


def test_settings_reach_the_pipeline(answers):
    chosen = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "best_of": 2}
    images, _ = last(answers.draw("a dog", 2, guidance_scale="1, 4", seed="1", **chosen))
    assert same(images, answers.pipeline("a dog", 2, guidance_scale=(1, 4), seed=1, **chosen).images)


def test_images_get_sharper_where_codes_go_from_coarse_to_fine(stage_pipeline):
    turns = [images for images, _ in Handlers(stage_pipeline).draw("a dog", 2, seed="1")]
    assert len(turns) == stage_pipeline.processor.layout.num_codes
    codes = stage_pipeline("a dog", 2, seed=1).codes
    for number, images in enumerate(turns, start=1):
        assert same(images, stage_pipeline.processor.decode_images(codes[:, :number]))


def test_of_a_grid_there_is_one_turn(pipeline):
    assert len(list(Handlers(pipeline).draw("a dog", 2, seed="1"))) == 1


def test_a_completed_image_keeps_its_first_codes(answers, file):
    processor = answers.pipeline.processor
    (seen,) = answers.seen(file)
    for keep in (0, 2, processor.layout.num_codes - 1, processor.layout.num_codes):
        images, _ = last(answers.draw("a red disc", 3, seed="5", image=file, keep=keep))
        assert same(images, answers.pipeline("a red disc", 3, seed=5, image=seen, keep=keep).images)


def test_what_the_model_sees_is_what_its_tokenizer_reads(answers, file):
    tokenizer = answers.pipeline.processor.image_tokenizer
    (seen,) = answers.seen(file)
    assert same([seen], images_from_pixels(load_pixels([file], tokenizer)))
    assert seen.size == (tokenizer.config.image_size,) * 2


def test_codes_and_what_they_show(answers, file):
    processor = answers.pipeline.processor
    ((stages, text),) = answers.codes(file)
    codes = processor.encode_images([file])
    assert text == " ".join(map(str, codes[0].tolist()))
    images, labels = zip(*stages, strict=True)
    assert 1 <= len(stages) <= MOST_STAGES and len(set(labels)) == len(labels)
    assert same(images[-1:], processor.decode_images(codes))


def test_it_captions_as_the_pipeline_does(pipeline, file):
    setattr(pipeline.prior.generation_config, CAPTION_KEY, True)
    (text,) = Handlers(pipeline).caption(file)
    assert text == ImageToTextPipeline(pipeline.prior, pipeline.processor)([file])[0]


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda a: a.draw("  "), "the caption is empty"),
        (lambda a: a.draw("a dog", guidance_scale="strong"), "guidance must be a number, or several .* got 'strong'"),
        (lambda a: a.draw("a dog", seed="-1"), "a seed must be a whole number of at least 0, got '-1'"),
        (lambda a: a.draw("a dog", temperature=-1), "temperature"),
        (lambda a: a.draw("a dog", keep=1), "there is no image"),
        (lambda a: a.seen(None), "there is no image"),
        (lambda a: a.codes(__file__), "not an image"),
        (lambda a: a.caption(None), "not learned to caption"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_came(pipeline, ask, complaint):
    with pytest.raises(ValueError, match=complaint):
        list(ask(Handlers(pipeline)))


def test_guidance_as_it_is_typed():
    assert [guidance_of(text) for text in ("", " ", "3", "1, 4.5,")] == [None, None, 3.0, [1.0, 4.5]]
    assert [as_text(guidance) for guidance in (2.5, (1.0, 4.0))] == ["2.5", "1, 4"]


def test_a_seed_as_it_is_typed():
    assert seed_of(" 12 ") == 12 and seed_of("") != seed_of("")


def test_results_come_while_the_work_goes_on():
    def work(put):
        put(1)
        put(2)
        return 3

    assert list(stream_results(work)) == [1, 2, 3]


def test_what_goes_wrong_at_work_comes_out():
    def work(put):
        put(1)
        raise ValueError("too much")

    turns = stream_results(work)
    assert next(turns) == 1
    with pytest.raises(ValueError, match="too much"):
        next(turns)


def test_an_image_on_its_side_is_upright(pipeline, tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "side.png", exif=exif)
    (seen,) = Handlers(pipeline).seen(str(tmp_path / "side.png"))
    top, bottom = (np.asarray(seen.convert("L"))[row].mean() for row in (0, -1))
    assert top > bottom + 100
