import sys

import pytest
import torch
from PIL import Image

from tok2img.evaluation.metrics import measure_tokenizer
from tok2img.evaluation.text_metrics import measure_text_tokenizer
from tok2img.visualization.report_figures import (
    choose_evenly_spaced,
    render_code_patches,
    save_model_figures,
    save_text_tokenizer_figures,
    save_tokenizer_figures,
)
from tokenizers_vq import VQDrawForText, VQDrawTextConfig

LOG = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}]


def draw(image_tokenizer, images, pil_images, folder, log=()) -> list[str]:
    _, histogram = measure_tokenizer(image_tokenizer, images.split(4))
    files = save_tokenizer_figures(image_tokenizer, pil_images, histogram, log=log, folder=folder)
    assert sorted(files) == sorted(map(str, folder.iterdir()))
    return sorted(path.name for path in folder.iterdir())


def test_a_vqvae_has_a_sheet_and_charts(tiny_vqvae, images, pil_images, tmp_path):
    names = draw(tiny_vqvae, images, pil_images, tmp_path / "p", LOG)
    assert names == ["code_usage.png", "codebook.png", "curves.png", "reconstructions.png"]


def test_vqdraw_figures_have_stages_and_no_codebook_map(tiny_vqdraw, images, pil_images, tmp_path):
    names = draw(tiny_vqdraw, images, pil_images, tmp_path / "p")
    assert names == ["code_usage.png", "reconstructions.png", "stages.png"]


def test_a_text_tokenizer_has_its_texts_in_a_file(tmp_path):
    config = VQDrawTextConfig(
        alphabet=[63, 97, 98], max_length=8, span_length=8, num_stages=2, codebook_size=4, hidden_channels=8
    )
    model, texts = VQDrawForText(config).eval(), ["ab", "ba", "a"]
    _, histogram = measure_text_tokenizer(model, texts)
    files = save_text_tokenizer_figures(model, texts, histogram, log=LOG, folder=tmp_path / "p")
    assert [file.rsplit("/")[-1] for file in files] == ["reconstructions.txt", "code_usage.png", "curves.png"]
    assert "text  'ba'" in (tmp_path / "p" / "reconstructions.txt").read_text()


def test_without_matplotlib_the_sheets_are_drawn_and_a_line_names_the_extra(
    tiny_vqvae, images, pil_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(tiny_vqvae, images, pil_images, tmp_path / "p", LOG) == ["reconstructions.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "code_usage.png, codebook.png, curves.png" in line and "pip install 'tok2img[eval]'" in line


def test_a_model_has_a_sheet_of_samples_and_its_curves(pil_images, captions, tmp_path):
    files = save_model_figures(pil_images, captions, log=LOG, folder=tmp_path)
    assert files == [str(tmp_path / name) for name in ("samples.png", "curves.png")]
    with Image.open(files[0]) as sheet:
        assert sheet.width > 6 * 96


def test_a_run_too_short_to_log_a_loss_has_no_curves(pil_images, captions, tmp_path):
    log = [{"step": 3, "train_loss": 2.0, "train_runtime": 0.1}]
    assert save_model_figures(pil_images, captions, log=log, folder=tmp_path) == [str(tmp_path / "samples.png")]


def test_code_patch_is_the_center_cell_of_a_constant_code_image(tiny_vqvae):
    patches = render_code_patches(tiny_vqvae)
    assert len(patches) == 16 and {patch.size for patch in patches} == {(4, 4)}
    whole = tiny_vqvae.decode(torch.full((1, 4), 5))
    middle = whole[0, :, 4:, 4:].clamp(0, 1).mul(255).round().permute(1, 2, 0).flatten().tolist()
    assert list(patches[5].tobytes()) == pytest.approx(middle, abs=1)


def test_code_patches_without_a_grid_are_empty(tiny_vqdraw):
    assert render_code_patches(tiny_vqdraw) == []


def test_evenly_spaced_items_cover_all_rows():
    assert choose_evenly_spaced(range(100), 4) == [0, 25, 50, 75] and choose_evenly_spaced("ab", 4) == ["a", "b"]
