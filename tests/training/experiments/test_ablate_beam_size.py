"""The comparison of beams measures what it says, of every model alike."""

import pytest
import torch

from tok2img.data.shapes import shapes_dataset
from tokenizers_vq import VQDrawForImages, VQDrawImageConfig


@pytest.fixture
def vqdraw():
    """A model whose steps go far beyond what pixels can be."""
    config = VQDrawImageConfig(
        image_size=8, num_channels=1, num_stages=3, codebook_size=4, hidden_channels=8, feature_channels=8
    )
    torch.manual_seed(0)
    model = VQDrawForImages(config).eval()
    torch.nn.init.normal_(model.vqdraw.biases, std=2.0)
    return model


@pytest.fixture
def pixels():
    return torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_errors_are_those_of_the_model_and_smaller_for_images(script, vqdraw, pixels, monkeypatch):
    beams = script("experiments/ablate_beam_size")
    monkeypatch.setattr(beams, "BATCH_SIZE", 3)
    ((of_state, of_image, milliseconds),) = beams.measure({"a": vqdraw}, pixels, 1).values()
    output = vqdraw(pixels)
    assert of_state.item() == pytest.approx(output.metrics["mse"].item() / vqdraw.config.pixel_std**2, rel=1e-5)
    in_pixels = (output.reconstruction - pixels).square().mean().item()
    assert of_image.item() == pytest.approx(in_pixels / vqdraw.config.pixel_std**2, rel=1e-5)
    assert of_image < of_state and milliseconds > 0


def test_wider_beam_has_lower_error(script, vqdraw, pixels):
    greedy, wide = (script("experiments/ablate_beam_size").errors_and_time(vqdraw, pixels, beam)[0] for beam in (1, 8))
    assert wide < greedy


def test_main_prints_a_line_for_each_beam_and_model(script, vqdraw, tmp_path, capsys):
    folders = [str(tmp_path / name) for name in ("one", "other")]
    for folder in folders:
        vqdraw.save_pretrained(folder)
    (tmp_path / "data").mkdir()
    shapes_dataset("validation", 6).to_parquet(tmp_path / "data" / "test.parquet")
    script("experiments/ablate_beam_size").main(str(tmp_path / "data"), 4, *folders)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == [str(beam) for beam in (1, 2, 4, 8) for _ in folders]
    assert [line[-1] for line in lines] == folders * 4
    assert all(one[3] == other[3] for one, other in zip(lines[::2], lines[1::2], strict=True))
