import copy
import math

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainingArguments

from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior
from tok2img.recipes.config import PriorRecipe, RunSettings, TokenizerRecipe
from tok2img.recipes.train_tokenizer import train_tokenizer
from tok2img.recipes.training_run import training_arguments
from tok2img.tokenization.layout import SequenceLayout
from tok2img.trainer.datasets import ImageDataset
from tok2img.trainer.trainer import Trainer
from tokenizers_vq import VQVAE, VQDrawStudent
from tokenizers_vq.auto import load_image_tokenizer

LAYOUT = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
QUIET = {"warmup_steps": 0, "sample_steps": 0, "eval_steps": 0, "logging_steps": 1, "batch_size": 8}


def token_rows(num: int, *, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    columns = {"text_ids": (11, 3), "image_codes": (6, 4)}
    rows = {name: torch.randint(high, (num, length), generator=generator) for name, (high, length) in columns.items()}
    return Dataset.from_dict({name: column.tolist() for name, column in rows.items()}).with_format("torch")


def prior_trainer(out, *, max_eval_samples: int = 8, sample=None, sample_steps: int = 0, **settings) -> Trainer:
    """A tiny prior on random tokens, which it can learn by heart and not generalise from."""
    recipe = PriorRecipe(**({"out": str(out), "max_steps": 4} | QUIET | settings))
    model = PriorWithLoss(build_prior(LAYOUT, depth=1), LAYOUT, caption_dropout=0.0)
    return Trainer(
        model,
        training_arguments(recipe, best_by="image_loss"),
        train_dataset=token_rows(16, seed=1),
        eval_dataset=token_rows(max_eval_samples, seed=2),
        sample=sample,
        sample_steps=sample_steps,
    )


def logged(trainer: Trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.fixture
def image_rows(rows, tiny_vqvae) -> ImageDataset:
    return ImageDataset(rows, tiny_vqvae)


def image_trainer(model, image_rows, out, **settings) -> Trainer:
    recipe = RunSettings(**({"out": str(out), "max_steps": 2} | QUIET | settings))
    return Trainer(model, training_arguments(recipe), train_dataset=image_rows, eval_dataset=image_rows)


def test_the_parts_of_the_loss_are_in_the_log(tmp_path):
    trainer = prior_trainer(tmp_path, eval_steps=2)
    trainer.train()
    for name, count in {
        "text_loss": 4,
        "image_loss": 4,
        "eval_text_loss": 2,
        "eval_image_loss": 2,
        "eval_loss": 2,
    }.items():
        assert len(logged(trainer, name)) == count and all(map(math.isfinite, logged(trainer, name)))


def test_logged_parts_make_up_the_logged_loss(tmp_path):
    trainer = prior_trainer(tmp_path)
    trainer.train()
    parts = zip(logged(trainer, "text_loss"), logged(trainer, "image_loss"), strict=True)
    expected = [(text + 7 * image) / 8 for text, image in parts]
    assert logged(trainer, "loss") == pytest.approx(expected, abs=2e-4)


def test_the_parts_are_means_over_the_steps_since_the_last_line(tmp_path):
    every_step, every_other = prior_trainer(tmp_path / "a"), prior_trainer(tmp_path / "b", logging_steps=2)
    every_step.train()
    every_other.train()
    first, second, *_ = logged(every_step, "image_loss")
    assert logged(every_other, "image_loss")[0] == pytest.approx((first + second) / 2, abs=1e-5)


def test_training_lowers_the_loss(tmp_path):
    trainer = prior_trainer(tmp_path, max_steps=30, learning_rate=1e-2)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.7 * losses[0]


def test_the_weights_at_the_end_are_the_best_on_held_out_rows(tmp_path):
    trainer = prior_trainer(tmp_path, max_steps=20, eval_steps=4, learning_rate=2e-2, lr_scheduler_type="constant")
    trainer.train()
    held_out = logged(trainer, "eval_image_loss")
    assert held_out[-1] > min(held_out) + 0.1  # it learned by heart
    assert trainer.evaluate()["eval_image_loss"] == pytest.approx(min(held_out), abs=1e-5)


def test_the_best_weights_of_a_tokenizer_come_back_too(tiny_vqvae, image_rows, tmp_path):
    trainer = image_trainer(tiny_vqvae, image_rows, tmp_path, max_steps=3, eval_steps=1, learning_rate=0.3)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(logged(trainer, "eval_loss")), rel=1e-5)


def test_held_out_loss_is_a_mean_over_rows_and_not_over_batches(tmp_path):
    trainer = prior_trainer(tmp_path, max_eval_samples=11)
    whole = token_rows(11, seed=2)[:]
    expected = trainer.model.eval()(whole["text_ids"], whole["image_codes"]).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_images_are_drawn_every_so_many_steps(tmp_path):
    trainer = prior_trainer(tmp_path, sample=lambda: Image.new("RGB", (2, 2)), sample_steps=2, max_steps=5)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]


def test_drawing_images_changes_no_training_step(tmp_path):
    def draw() -> Image.Image:
        torch.rand(100)
        return Image.new("RGB", (2, 2))

    losses = []
    for sample_steps in (0, 1):
        trainer = prior_trainer(tmp_path / str(sample_steps), sample=draw, sample_steps=sample_steps)
        trainer.model.caption_dropout = 0.5
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_two_batches_of_four_are_a_batch_of_eight(tmp_path):
    whole = prior_trainer(tmp_path / "a", batch_size=8)
    parts = prior_trainer(tmp_path / "b", batch_size=4, gradient_accumulation_steps=2)
    for trainer in (whole, parts):
        trainer.train()
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), abs=2e-4)
    assert logged(parts, "image_loss")[0] == pytest.approx(logged(whole, "image_loss")[0], abs=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_same_seed_trains_the_same_weights(tmp_path):
    one, other = (prior_trainer(tmp_path / name) for name in "ab")
    for trainer in (one, other):
        trainer.train()
    assert all(a.equal(b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_tokenizer_looks_at_its_training_data_before_the_first_step(tiny_vqvae, image_rows, tmp_path, monkeypatch):
    seen = []

    def spy(model, pixel_values):
        seen.append((copy.deepcopy(model.state_dict()), pixel_values))

    monkeypatch.setattr(VQVAE, "init_from_data", spy)
    before = copy.deepcopy(tiny_vqvae.state_dict())
    image_trainer(tiny_vqvae, image_rows, tmp_path).train()
    ((state, pixel_values),) = seen
    assert all(tensor.equal(before[name]) for name, tensor in state.items())
    expected = torch.stack([image_rows[row]["pixel_values"] for row in range(len(image_rows))])
    assert torch.cat([pixel_values, expected]).unique(dim=0).shape == expected.shape


def test_a_prior_trains_in_bfloat16(tmp_path):
    trainer = prior_trainer(tmp_path, bf16=True)
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "loss")))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_a_tokenizer_trains_in_bfloat16(tiny_vqvae, image_rows, tmp_path):
    trainer = image_trainer(tiny_vqvae, image_rows, tmp_path, bf16=True, eval_steps=1)
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "loss") + logged(trainer, "eval_mse")))


def test_the_log_goes_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    prior_trainer(tmp_path, report_to="tensorboard", max_steps=1).train()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_only_the_best_and_the_last_checkpoint_are_kept(tmp_path):
    trainer = prior_trainer(tmp_path, max_steps=5, eval_steps=1)
    trainer.train()
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) <= 2


def test_image_rows_are_the_pixels_that_a_tokenizer_reads(rows, image_rows, images, monkeypatch, tiny_vqvae):
    monkeypatch.setattr("tok2img.trainer.datasets.MAX_DECODED_BYTES", 0)
    asked_for = ImageDataset(rows, tiny_vqvae)
    assert asked_for.decoded is None and image_rows.decoded is not None
    for row in range(len(rows)):
        assert asked_for[row]["pixel_values"].equal(image_rows[row]["pixel_values"])
        torch.testing.assert_close(image_rows[row]["pixel_values"], images[row], atol=0.6 / 255, rtol=0)


def test_a_bad_image_is_named_by_its_row_before_training(pil_images, tiny_vqvae):
    broken = Dataset.from_dict({"image": [b"no image"], "caption": ["a"]})
    with pytest.raises(ValueError, match="row 0: .*not an image"):
        ImageDataset(broken, tiny_vqvae)


def test_the_last_weights_are_evaluated_whatever_the_rhythm(tiny_vqvae, images, tmp_path):
    rows = [{"pixel_values": image} for image in images]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(tiny_vqvae, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [2, 3]


def test_a_recipe_distils_a_teacher_into_a_student(tiny_vqdraw, rows, tmp_path):
    tiny_vqdraw.save_pretrained(tmp_path / "teacher")
    recipe = TokenizerRecipe(
        tokenizer="vqdraw_student",
        teacher=str(tmp_path / "teacher"),
        data=str(tmp_path / "rows.parquet"),
        out=str(tmp_path / "student"),
        model={"hidden_channels": 16, "vector_dim": 32},
        max_steps=4,
        batch_size=2,
        eval_steps=2,
        sample_steps=2,
    )
    train_tokenizer(recipe)
    student = load_image_tokenizer(tmp_path / "student")
    assert isinstance(student, VQDrawStudent) and student.num_codes == 4
    assert (tmp_path / "student" / "samples" / "step-000004.png").is_file()


def test_a_teacher_must_be_a_vqdraw_model(tiny_vqvae, rows, tmp_path):
    tiny_vqvae.save_pretrained(tmp_path / "teacher")
    recipe = TokenizerRecipe(
        tokenizer="vqdraw_student", teacher=str(tmp_path / "teacher"), data=str(tmp_path / "rows.parquet"), out="x"
    )
    with pytest.raises(ValueError, match="holds a VQVAE, not a VQ-DRAW model"):
        train_tokenizer(recipe)
