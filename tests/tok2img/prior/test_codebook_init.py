import pytest
import torch
from datasets import Dataset

from tok2img.prior.codebook_init import get_codebooks, init_from_codebook
from tok2img.prior.model import build_prior
from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.train_prior import train_prior
from tok2img.tokenization.layout import SequenceLayout


@pytest.fixture
def layout() -> SequenceLayout:
    """Two groups of 32 codes each."""
    return SequenceLayout(
        text_vocab_size=11, text_length=3, num_codes=5, codebook_size=32, positions_per_codebook=(1, 4)
    )


@pytest.fixture
def codebooks() -> list[torch.Tensor]:
    """One far from the origin and one wide."""
    return [torch.rand(32, 8) + 5, 40 * torch.randn(32, 16)]


def embeddings(prior) -> torch.Tensor:
    return prior.get_input_embeddings().weight.detach().clone()


def image_rows(prior, layout) -> list[torch.Tensor]:
    """The embeddings of each group's codes."""
    first, size = layout.image.offset, layout.codebook_size
    return [
        embeddings(prior)[start : start + size] for start in range(first, first + size * len(layout.image.groups), size)
    ]


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item()


def test_init_from_codebook_keeps_distances(layout, codebooks):
    prior = build_prior(layout, depth=1)
    init_from_codebook(prior, layout, codebooks)
    for rows, vectors in zip(image_rows(prior, layout), codebooks, strict=True):
        assert correlation(torch.pdist(rows), torch.pdist(vectors)) > 0.9999


def test_init_from_codebook_of_long_vectors_nearly_keeps_distances(layout):
    prior = build_prior(layout, depth=1)
    clusters = [10 * torch.randn(4, 200).repeat(8, 1) + torch.randn(32, 200) for _ in range(2)]
    init_from_codebook(prior, layout, clusters)
    for rows, vectors in zip(image_rows(prior, layout), clusters, strict=True):
        assert correlation(torch.pdist(rows), torch.pdist(vectors)) > 0.95


def test_init_from_codebook_keeps_the_standard_deviation(layout, codebooks):
    prior = build_prior(layout, depth=1)
    before = torch.cat(image_rows(prior, layout)).std()
    init_from_codebook(prior, layout, codebooks)
    for rows in image_rows(prior, layout):
        torch.testing.assert_close(rows.std(), before)
        torch.testing.assert_close(rows.mean(dim=0), torch.zeros(64), atol=1e-6, rtol=0)


def test_init_from_codebook_changes_image_embeddings_only(layout, codebooks):
    prior, untouched = build_prior(layout, depth=1), build_prior(layout, depth=1)
    init_from_codebook(prior, layout, codebooks)
    image = slice(layout.image.offset, layout.image.offset + layout.image.num_ids)
    assert (embeddings(prior)[image] != embeddings(untouched)[image]).any(dim=1).all()
    prior.get_input_embeddings().weight.data[image] = embeddings(untouched)[image]
    for name, parameter in untouched.named_parameters():
        assert parameter.equal(prior.get_parameter(name)), name


def test_the_seed_alone_decides_the_projection(layout, codebooks):
    started = []
    for seed in (1, 1, 2):
        prior = build_prior(layout, depth=1)
        torch.rand(3)
        init_from_codebook(prior, layout, codebooks, seed=seed)
        started.append(embeddings(prior))
    assert started[0].equal(started[1]) and not started[0].equal(started[2])


def test_init_from_codebook_of_one_code_is_finite():
    layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=1)
    prior = build_prior(layout, depth=1)
    init_from_codebook(prior, layout, [torch.ones(1, 8)])
    assert embeddings(prior).isfinite().all()


def test_a_tokenizer_without_vectors_is_refused_by_its_name(tiny_vqdraw):
    with pytest.raises(ValueError, match="codebook vectors, such as a VQVAE, got a VQDrawForImages"):
        get_codebooks(tiny_vqdraw)


class TestRecipe:
    @pytest.fixture
    def recipe(self, pil_images, captions, tiny_vqvae, tmp_path) -> PriorRecipe:
        """Two steps on twelve images, so slow that the weights stay about where they start."""
        data = Dataset.from_dict({"image": pil_images * 4, "caption": captions * 4})
        data.to_parquet(str(tmp_path / "train.parquet"))
        tiny_vqvae.save_pretrained(str(tmp_path / "tokenizer"))
        return PriorRecipe(
            data=str(tmp_path / "train.parquet"),
            image_tokenizer=str(tmp_path / "tokenizer"),
            out=str(tmp_path / "model"),
            init_from_codebook=True,
            learning_rate=1e-7,
            max_steps=2,
            batch_size=4,
            depth=1,
            vocab_size=270,
            eval_steps=0,
            sample_steps=0,
        )

    def test_a_recipe_starts_from_the_codebook(self, recipe, tiny_vqvae):
        pipeline = train_prior(recipe)
        (rows,) = image_rows(pipeline.prior, pipeline.processor.layout)
        (vectors,) = get_codebooks(tiny_vqvae)
        assert correlation(torch.pdist(rows.cpu()), torch.pdist(vectors)) > 0.99

    def test_a_tokenizer_without_vectors_is_refused_before_anything_is_tokenized(self, recipe, tiny_vqdraw, tmp_path):
        tiny_vqdraw.save_pretrained(recipe.image_tokenizer)
        with pytest.raises(ValueError, match="leave init_from_codebook false"):
            train_prior(recipe)
        assert not (tmp_path / "model" / "tokens").exists()
