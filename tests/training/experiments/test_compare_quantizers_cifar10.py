"""The comparison of quantizers trains each of them on the same images, a peer's too where one is given."""

import sys

import pytest
import torch

from tok2img.data.shapes import shapes_dataset

PEER = """
import torch

class VectorQuantize(torch.nn.Module):
    def __init__(self, *, dim, codebook_size, commitment_weight, accept_image_fmap, decay=0.8):
        super().__init__()

    def forward(self, x):
        return x, torch.zeros(len(x), *x.shape[2:], dtype=torch.int64), torch.zeros(1)
"""


@pytest.fixture
def comparison(script, monkeypatch):
    loaded = script("experiments/compare_quantizers_cifar10")
    monkeypatch.setattr(loaded, "CODEBOOK_SIZE", 16)
    monkeypatch.setattr(loaded, "IMAGE_SIZE", 8)
    return loaded


@pytest.fixture
def pixels():
    return torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5


def test_the_plain_quantizer_gives_entries_of_its_codebook_and_passes_gradients(comparison):
    torch.manual_seed(0)
    quantizer = comparison.PlainQuantizer().train()
    x = torch.randn(8, 64, 4, 4, requires_grad=True)
    before = quantizer.codebook.clone()
    quantizer(x)
    assert (quantizer.codebook != before).any()
    quantized, codes, loss = quantizer.eval()(x)
    torch.testing.assert_close(quantized, quantizer.codebook[codes].movedim(-1, 1))
    torch.testing.assert_close(loss, comparison.COMMITMENT * (x - quantized).square().mean())
    quantized.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_training_lowers_the_error_and_repeats_itself(comparison, pixels):
    first, again, longer = (
        comparison.train(comparison.OurQuantizer, pixels, pixels, num_steps=steps, seed=0, search_steps=2)
        for steps in (2, 2, 12)
    )
    assert first.error == again.error
    assert longer.error < first.error


def test_a_search_lowers_the_error_and_no_step_of_it_does_not(comparison, pixels):
    settings = {"num_steps": 12, "seed": 0}
    none, some = (
        comparison.train(comparison.OurQuantizer, pixels, pixels, search_steps=steps, **settings) for steps in (0, 5)
    )
    assert none.searched == pytest.approx(none.error, rel=1e-5) and none.error == some.error
    assert some.searched < some.error


def test_only_those_named_are_trained(comparison, tmp_path, capsys):
    shapes_dataset("train", 4).to_parquet(tmp_path / "train.parquet")
    shapes_dataset("validation", 4).to_parquet(tmp_path / "test.parquet")
    comparison.main(str(tmp_path), steps=1, seeds=1, names=["plain"], search_steps=0)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["plain", "plain"]
    with pytest.raises(Exception, match="no quantizer 'best'; there are ours, plain"):
        comparison.main(str(tmp_path), steps=1, seeds=1, names=["best"])


def test_the_table_has_a_line_a_run_and_the_medians(comparison, tmp_path, monkeypatch, capsys):
    shapes_dataset("train", 4).to_parquet(tmp_path / "train.parquet")
    shapes_dataset("validation", 4).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "vector_quantize_pytorch.py").write_text(PEER)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "vector_quantize_pytorch", raising=False)
    comparison.main(str(tmp_path), steps=1, seeds=2, peer=[tmp_path / "peer"])
    monkeypatch.delitem(sys.modules, "vector_quantize_pytorch", raising=False)
    lines = capsys.readouterr().out.splitlines()
    names = ["ours", "plain", "vector-quantize-pytorch", "the same, decay 0.99"]
    expected = [f"{name}, {end}" for end in ("seed 0", "seed 1", "median") for name in names]
    assert [line[:32].strip() for line in lines[1:]] == expected
    assert all(float(line.split()[-4]) > 0 for line in lines[1:])
