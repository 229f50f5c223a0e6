"""The figures of the search are those of the model."""

import pytest
import torch

from tok2img.data.shapes import shapes_dataset


def test_errors_are_those_of_images_and_fall(script, tiny_vqvae, images, monkeypatch):
    measured = script("experiments/ablate_latent_optimization")
    monkeypatch.setattr(measured, "BATCH_SIZE", 4)
    plain, searched = (measured.measure(tiny_vqvae, images, steps) for steps in (0, 10))
    expected = (tiny_vqvae(images).reconstruction - images).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(plain.errors, expected)
    assert plain.codes.equal(tiny_vqvae.encode(images)) and plain.seconds > 0
    assert searched.codes.equal(tiny_vqvae.encode(images, search_steps=10))


def test_main_prints_a_line_for_every_number_of_steps(script, tiny_vqvae, tiny_vqdraw, tmp_path, capsys):
    shapes_dataset("validation", 4).to_parquet(tmp_path / "test.parquet")
    tiny_vqvae.save_pretrained(str(tmp_path / "vqvae"))
    measured = script("experiments/ablate_latent_optimization")
    measured.main(str(tmp_path), 4, str(tmp_path / "vqvae"))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines] == list(measured.SEARCH_STEPS)
    assert lines[0].split()[4] == "1.000" and float(lines[-1].split()[4]) <= 1
    tiny_vqdraw.save_pretrained(str(tmp_path / "vqdraw"))
    with pytest.raises(SystemExit, match="contains a VQDrawForImages, not a VQVAE"):
        measured.main(str(tmp_path), 4, str(tmp_path / "vqdraw"))
