import pytest
import torch

from tok2img.generation.generate import generate
from tok2img.generation.sampling import Sampling
from tok2img.pipelines.image_conditioning import encode_init_images, keep_mask
from tokenizers_vq.images.processing import images_from_pixels

MASKS = [[True, True, False, False], [False, True, True, False], [True, False, True, True], [False] * 4]
only_qwen = pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)


@pytest.fixture
def text_ids(layout) -> torch.Tensor:
    pad = layout.pad_id
    return torch.tensor([[1, 5, 10], [3, 3, pad], [pad, pad, pad]])


@pytest.mark.parametrize("keep", MASKS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_kept_codes_stay_and_a_cache_changes_none_of_the_others(prior, layout, text_ids, keep, scale):
    given, mask = torch.randint(6, (3, 4)), torch.tensor(keep)
    settings = {"sampling": Sampling(guidance_scale=scale), "seed": 4, "init_codes": given, "keep_mask": mask}
    codes = generate(prior, layout, text_ids, **settings)
    assert codes[:, mask].equal(given[:, mask])
    assert codes.equal(generate(prior, layout, text_ids, **settings, use_cache=False))


@pytest.mark.parametrize("keep", MASKS)
def test_completing_an_image_with_its_own_seed_repeats_it(prior, layout, text_ids, keep):
    drawn = generate(prior, layout, text_ids, seed=2)
    assert generate(prior, layout, text_ids, seed=2, init_codes=drawn, keep_mask=torch.tensor(keep)).equal(drawn)


@only_qwen
def test_kept_codes_at_the_start_are_read_in_one_pass(prior, layout, text_ids, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        prior.model, "forward", lambda input_ids, _forward=prior.model.forward, **rest: (
            lengths.append(input_ids.shape[1]), _forward(input_ids, **rest)
        )[1]
    )  # fmt: skip
    generate(prior, layout, text_ids, init_codes=torch.zeros(3, 4, dtype=torch.int64), keep_mask=torch.arange(4) < 2)
    assert lengths == [layout.prompt_length + 2, 1]


@only_qwen
def test_generate_does_not_change_its_init_codes(prior, layout, text_ids):
    given = torch.zeros(3, 4, dtype=torch.int64)
    generate(prior, layout, text_ids, init_codes=given, keep_mask=torch.zeros(4, dtype=torch.bool))
    assert not given.any()


@only_qwen
@pytest.mark.parametrize(
    ("given", "keep", "message"),
    [
        (torch.zeros(3, 4).long(), None, "go together"),
        (None, torch.ones(4).bool(), "go together"),
        (torch.zeros(2, 4).long(), torch.ones(4).bool(), "Expected init_codes `3 4`"),
        (torch.zeros(3, 4).long(), torch.ones(4), "keep_mask of booleans"),
        (torch.full((3, 4), 6), torch.ones(4).bool(), r"0\.\.5, got 6"),
        (torch.full((3, 4), -1), torch.ones(4).bool(), r"0\.\.5, got -1"),
    ],
)
def test_generate_with_invalid_init_codes_raises(prior, layout, text_ids, given, keep, message):
    with pytest.raises(ValueError, match=message):
        generate(prior, layout, text_ids, init_codes=given, keep_mask=keep)


def test_keep_mask_of_a_number_and_of_booleans(tiny_vqvae):
    assert keep_mask(2, tiny_vqvae).tolist() == [True, True, False, False]
    for keep in ([True, False, False, True], torch.tensor([[True, False], [False, True]])):
        assert keep_mask(keep, tiny_vqvae).tolist() == [True, False, False, True]


def test_keep_mask_of_top_is_the_upper_half_of_every_grid(tiny_vqvae, tiny_residual):
    assert keep_mask("top", tiny_vqvae).int().tolist() == [1, 1, 0, 0]
    assert keep_mask("top", tiny_residual).int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (5, r"0\.\.4 codes"),
        (-1, r"0\.\.4 codes"),
        (1.5, "keep must be"),
        (True, "keep must be"),
        ("left", "keep must be"),
        ([True], "4 booleans"),
        ([1, 0, 0, 1], "4 booleans"),
    ],
)
def test_keep_mask_of_an_invalid_value_raises(tiny_vqvae, keep, message):
    with pytest.raises(ValueError, match=message):
        keep_mask(keep, tiny_vqvae)


def test_keep_mask_of_top_without_a_grid_raises(tiny_vqdraw):
    with pytest.raises(ValueError, match="Expected codes on one grid"):
        keep_mask("top", tiny_vqdraw)


def test_the_top_of_an_image_is_completed(pipeline, pil_images):
    output = pipeline(["a dog", "a red disc"], 3, seed=0, image=pil_images[0], keep="top")
    codes = pipeline.processor.encode_images(pil_images[:1])
    assert output.codes[:, :2].equal(codes[:, :2].expand(6, 2)) and len(output.codes.unique(dim=0)) > 1


def test_every_prompt_may_have_an_image_of_its_own(pipeline, pil_images):
    output = pipeline(
        ["a dog", "a red disc"], 2, seed=0, image=pil_images[:2], keep=3, guidance_scale=2.0, batch_size=3
    )
    codes = pipeline.processor.encode_images(pil_images[:2])
    assert output.codes[:, :3].equal(codes[[0, 0, 1, 1], :3])


def test_codes_are_varied_without_an_image(pipeline):
    codes = torch.tensor([3, 1, 4, 1])
    output = pipeline("a dog", 5, seed=0, image=codes, keep=[False, True, False, True])
    assert output.codes[:, [1, 3]].eq(1).all()


def test_an_image_of_another_size_is_refused_before_any_work(pipeline, pil_images, monkeypatch):
    monkeypatch.setattr(type(pipeline.processor), "encode_text", lambda *given: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="Expected an image of 8x8 pixels.*got 9x8"):
        pipeline("a dog", image=pil_images[0].resize((9, 8)), keep=1)


def test_another_number_of_images_than_prompts_is_refused(pipeline, pil_images):
    with pytest.raises(ValueError, match="one image to keep codes of, or 3, one per prompt, got 2"):
        pipeline(["a", "b", "c"], image=pil_images[:2], keep=1)


@pytest.mark.parametrize("given", [{"keep": 1}, {"image": images_from_pixels(torch.rand(1, 3, 8, 8))[0]}])
def test_image_without_keep_or_keep_without_image_raises(pipeline, given):
    with pytest.raises(ValueError, match="image and keep go together"):
        pipeline("a dog", **given)


def test_encode_init_images_returns_codes_unchanged(processor):
    assert encode_init_images(torch.arange(4), processor, 3).tolist() == [[0, 1, 2, 3]] * 3
