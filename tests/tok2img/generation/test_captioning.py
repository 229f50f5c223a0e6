import copy
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from tok2img.evaluation.reports import report_on_captions, report_on_model
from tok2img.evaluation.verifiers import CaptionVerifier
from tok2img.generation.captioning import CAPTION_KEY, can_caption, caption
from tok2img.generation.generate import generate
from tok2img.generation.sampling import Sampling
from tok2img.pipelines.image_to_text import ImageToTextPipeline
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior, caption_logits, last_hidden_state
from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.train_prior import train_prior
from tok2img.tokenization.token_dataset import save_tokens
from tok2img.trainer.training_log import load_log

one_prior = pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)
DRAWN = Sampling(temperature=1.0)


def plain_caption_loss(prior, layout, text_ids, codes) -> torch.Tensor:
    """As a textbook writes it: all logits, those that are no text and no [PAD] at minus infinity, -100 after the first [PAD]."""
    input_ids = layout.caption_sequence(text_ids, codes)
    logits = prior(input_ids).logits[:, :-1]
    allowed = torch.zeros(layout.vocab_size, dtype=torch.bool)
    allowed[: layout.text_vocab_size] = allowed[layout.pad_id] = True
    labels = torch.full_like(input_ids, -100)
    for row, text in enumerate(text_ids.tolist()):
        written = text.index(layout.pad_id) + 1 if layout.pad_id in text else len(text)
        labels[row, -layout.text_length :][:written] = torch.tensor(text[:written])
    return F.cross_entropy(logits.masked_fill(~allowed, -1e9).transpose(1, 2), labels[:, 1:])


def both_ways(prior, layout, text_ids, codes, *, num: int) -> torch.Tensor:
    """The plain loss of a batch whose first `num` rows caption."""
    draw = PriorWithLoss(prior, layout, caption_dropout=0.0).train()(text_ids[num:], codes[num:]).loss
    return ((4 - num) * draw + num * plain_caption_loss(prior, layout, text_ids[:num], codes[:num])) / 4


def test_the_loss_of_both_directions_is_the_masked_cross_entropy(prior, layout, text_ids, codes):
    model = PriorWithLoss(prior, layout, image_to_text_fraction=0.5, caption_dropout=0.0).train()
    torch.testing.assert_close(model(text_ids, codes).loss, both_ways(prior, layout, text_ids, codes, num=2))


def test_the_gradients_of_both_directions_are_those_of_the_masked_cross_entropy(prior, layout, text_ids, codes):
    plain = copy.deepcopy(prior)
    PriorWithLoss(prior, layout, image_to_text_fraction=0.5, caption_dropout=0.0).train()(
        text_ids, codes
    ).loss.backward()
    both_ways(plain, layout, text_ids, codes, num=2).backward()
    for (name, ours), theirs in zip(prior.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, atol=1e-6, rtol=1e-4)


@one_prior
class TestShares:
    def test_in_eval_mode_all_rows_are_measured_in_both_directions(self, prior, layout, text_ids, codes):
        drawing = PriorWithLoss(prior, layout).eval()(text_ids, codes)
        both = PriorWithLoss(prior, layout, image_to_text_fraction=0.25).eval()(text_ids, codes)
        reading = plain_caption_loss(prior, layout, text_ids, codes)
        torch.testing.assert_close(both.metrics["caption_loss"], reading)
        assert both.metrics["image_loss"] == pytest.approx(drawing.metrics["image_loss"].item())
        torch.testing.assert_close(both.loss, 0.75 * drawing.loss + 0.25 * reading)

    def test_a_fraction_of_zero_has_no_caption_loss(self, prior, layout, text_ids, codes):
        output = PriorWithLoss(prior, layout, image_to_text_fraction=0.0).train()(text_ids, codes)
        assert output.metrics.keys() == {"text_loss", "image_loss"}

    def test_about_the_given_fraction_of_rows_learns_to_caption(self, prior, layout):
        model = PriorWithLoss(prior, layout, image_to_text_fraction=0.3).train()
        numbers = [model.sample_num_captioning(4, torch.rand(())) for _ in range(500)]
        assert set(numbers) == {1, 2} and 1.1 < sum(numbers) / 500 < 1.3

    @pytest.mark.parametrize("share", [0.001, 0.999])
    def test_a_batch_of_one_row_has_a_finite_loss(self, prior, layout, text_ids, codes, share):
        model = PriorWithLoss(prior, layout, image_to_text_fraction=share).train()
        assert model(text_ids[:1], codes[:1]).loss.isfinite()

    def test_caption_dropout_keeps_the_text_of_captioning_rows(self, prior, layout, text_ids, codes):
        model = PriorWithLoss(prior, layout, image_to_text_fraction=0.5, caption_dropout=1.0).train()
        metrics = model(text_ids, codes).metrics
        assert metrics["text_loss"] == 0
        torch.testing.assert_close(metrics["caption_loss"], plain_caption_loss(prior, layout, text_ids[:2], codes[:2]))


def test_image_to_text_fraction_of_one_raises():
    with pytest.raises(ValueError, match="'image_to_text_fraction' must be below 1"):
        PriorRecipe(image_to_text_fraction=1.0)


def test_the_two_sequences_hold_the_same_ids_in_another_order(layout, text_ids, codes):
    one, two = layout.sequence(text_ids, codes), layout.caption_sequence(text_ids, codes)
    assert one.sort().values.equal(two.sort().values) and one.shape[1] == layout.sequence_length
    assert two[:, : layout.caption_prompt_length].equal(layout.caption_prompt(codes))
    assert (two[:, layout.caption_prompt_length - 1] == layout.sep_id).all() and (two[:, 0] == layout.bos_id).all()


def test_caption_prompt_with_too_few_codes_raises(layout):
    with pytest.raises(ValueError, match="codes must be `b 4`"):
        layout.caption_prompt(torch.zeros(1, 3, dtype=torch.int64))


class TestCaption:
    @pytest.mark.parametrize("sampling", [None, DRAWN], ids=["greedy", "sampled"])
    def test_the_cache_changes_no_id(self, prior, layout, codes, sampling):
        cached, plain = (caption(prior, layout, codes, sampling=sampling, use_cache=use) for use in (True, False))
        assert cached.equal(plain)

    def test_greedy_ids_are_the_likeliest_of_the_teacher_forced_sequence(self, prior, layout, codes):
        text_ids = caption(prior, layout, codes)
        hidden = last_hidden_state(prior, layout.caption_sequence(text_ids, codes)[:, :-1])[
            :, layout.caption_prompt_length - 1 :
        ]
        likeliest = caption_logits(prior, hidden, layout).argmax(dim=-1)
        written = torch.cat([torch.ones(4, 1, dtype=torch.bool), text_ids[:, :-1] != layout.pad_id], dim=1)
        assert text_ids[written].equal(likeliest[written])

    @one_prior
    def test_only_text_and_pads_are_written_and_nothing_after_a_pad(self, prior, layout, codes):
        seen = caption(prior, layout, codes.repeat(50, 1), sampling=Sampling(temperature=5.0))
        is_pad = seen == layout.pad_id
        assert ((seen < layout.text_vocab_size) | is_pad).all() and is_pad.any() and not is_pad.all()
        assert is_pad.int().diff(dim=1).min() >= 0

    @one_prior
    def test_a_caption_depends_on_seed_and_index_alone(self, prior, layout, codes):
        together = caption(prior, layout, codes, sampling=DRAWN, seed=4)
        alone = [
            caption(prior, layout, codes[row : row + 1], sampling=DRAWN, seed=4, indices=[row]) for row in range(4)
        ]
        assert together.equal(torch.cat(alone))
        others = [caption(prior, layout, codes, sampling=DRAWN, seed=seed) for seed in (5, 6, 7)]
        assert any(not other.equal(together) for other in others)

    @one_prior
    def test_caption_stops_when_all_have_ended(self, prior, layout, codes, monkeypatch):
        steps = []

        def all_ended(logits, uniforms, sampling):
            steps.append(1)
            return torch.full((len(logits),), layout.pad_id)

        monkeypatch.setattr("tok2img.generation.captioning.sample_codes", all_ended)
        assert caption(prior, layout, codes).equal(layout.null_text_ids(4)) and len(steps) == 1

    @one_prior
    def test_guidance_and_a_wrong_number_of_indices_are_refused(self, prior, layout, codes):
        with pytest.raises(ValueError, match="without guidance, got guidance_scale 3"):
            caption(prior, layout, codes, sampling=Sampling(guidance_scale=3.0))
        with pytest.raises(ValueError, match="got 1 indices for 4 images"):
            caption(prior, layout, codes, indices=[0])


@pytest.fixture
def both(processor, rows) -> tuple[torch.Tensor, torch.Tensor]:
    return processor.encode_text(rows["caption"][:]), processor.encode_images(rows["image"][:])


def test_one_prior_learns_to_generate_images_and_captions(processor, both, pil_images, rows):
    layout = processor.layout
    prior = build_prior(layout, depth=1)
    model = PriorWithLoss(prior, layout, image_to_text_fraction=0.5, caption_dropout=0.0).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, 120)
    for _ in range(120):
        optimizer.zero_grad()
        for order in (torch.arange(6), torch.arange(6).flip(0)):  # each row learns both
            model(both[0][order], both[1][order]).loss.backward()
        optimizer.step()
        schedule.step()
    setattr(prior.generation_config, CAPTION_KEY, True)
    measured = report_on_captions(TextToImagePipeline(prior, processor), rows)
    assert measured == {"caption_exact_match": 1.0, "caption_token_accuracy": 1.0}
    assert ImageToTextPipeline(prior, processor)(pil_images) == [processor.decode_text(text) for text in both[0]]
    assert generate(prior, layout, both[0], sampling=Sampling(temperature=0)).equal(both[1])


class TestCommand:
    @pytest.fixture
    def model(self, processor, rows, tmp_path) -> str:
        """A model that a recipe has trained in both directions for a few steps."""
        save_tokens(rows.select([row % 6 for row in range(24)]), processor, tmp_path / "tokens")
        keys = {"max_steps": 3, "batch_size": 8, "eval_steps": 2, "logging_steps": 1, "sample_steps": 0}
        folder, tokens = str(tmp_path / "model"), str(tmp_path / "tokens")
        train_prior(PriorRecipe(tokens=tokens, out=folder, depth=1, image_to_text_fraction=0.5, **keys))
        return folder

    @pytest.fixture
    def run(self, monkeypatch, capsys):
        from tok2img.cli.app import main

        def run(*words: object) -> tuple[list[str], list[str], int]:
            monkeypatch.setattr(sys, "argv", ["tok2img", "caption", *map(str, words)])
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                main()
            printed = capsys.readouterr()
            return printed.out.splitlines(), printed.err.splitlines(), int(stop.value.code or 0)

        return run

    def test_caption_command_prints_one_line_per_image(self, run, model, pil_images, tmp_path):
        files = [tmp_path / f"{number}.png" for number in range(3)]
        for file, image in zip(files, pil_images, strict=False):
            image.save(file)
        said, _, code = run(*files, "--model", model)
        expected = ImageToTextPipeline.from_pretrained(model)(files)
        assert (code, said) == (0, [" ".join(text.split()) for text in expected])
        drawn = [run(*files, "--model", model, "--temperature", 1, "--seed", seed)[0] for seed in (1, 1)]
        assert drawn[0] == drawn[1]

    def test_caption_command_with_a_bad_image_names_the_file(self, run, model, tmp_path):
        (tmp_path / "bad.png").write_bytes(b"no image")
        said, complaint, code = run(tmp_path / "bad.png", "--model", model)
        assert (code, said, len(complaint)) == (2, [], 1) and "bad.png" in complaint[0]

    def test_a_model_that_has_not_learned_to_caption_is_refused(self, run, processor, pil_images, tmp_path):
        TextToImagePipeline(build_prior(processor.layout, depth=1), processor).save_pretrained(tmp_path / "drawer")
        pil_images[0].save(tmp_path / "one.png")
        said, complaint, code = run(tmp_path / "one.png", "--model", tmp_path / "drawer")
        assert (code, said, len(complaint)) == (2, [], 1) and "has not learned to caption" in complaint[0]
        assert re.search(r"--image-to-text-fraction", complaint[0])

    def test_captions_are_measured_with_the_rest_where_a_model_writes_any(self, model, processor, rows, tmp_path):
        verifier = CaptionVerifier(lambda image, caption: True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tok2img.evaluation.reports.find_verifier", lambda *_, **__: verifier)
            report, _ = report_on_model(model, rows, data="", num_images=2)
            TextToImagePipeline(build_prior(processor.layout, depth=1), processor).save_pretrained(tmp_path / "drawer")
            silent, _ = report_on_model(tmp_path / "drawer", rows, data="", num_images=2)
        texts = ImageToTextPipeline.from_pretrained(model)(rows["image"][:])
        right = [" ".join(text.split()) == caption for text, caption in zip(texts, rows["caption"], strict=True)]
        assert report["caption_exact_match"] == pytest.approx(sum(right) / len(right))
        assert 0 <= report["caption_token_accuracy"] <= 1
        assert "caption_exact_match" not in silent

    def test_a_captioning_model_still_generates_images(self, model):
        pipeline = TextToImagePipeline.from_pretrained(model)
        assert can_caption(pipeline.prior) and len(pipeline("a dog", seed=0).images) == 1
        assert {"caption_loss", "eval_caption_loss"} <= {name for entry in load_log(model) for name in entry}
