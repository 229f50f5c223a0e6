from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from tok2img.visualization.charts import (
    PALE_RED,
    RED,
    assign_to_grid,
    plot_code_usage,
    plot_codebook,
    plot_curves,
    principal_plane,
)

LOG = [
    {"step": 1, "loss": 3.0, "mse": 0.5, "learning_rate": 0.1},
    {"step": 2, "loss": None, "mse": 0.2, "learning_rate": 0.1},
    {"step": 2, "eval_loss": 2.5, "eval_mse": 0.3, "eval_code_usage": 0.5},
    {"step": 2, "train_loss": 2.5, "train_runtime": 9.0},
]


@pytest.fixture
def chart(tmp_path) -> Path:
    return tmp_path / "new" / "chart.png"


def pixels_of(color: str, path: Path) -> int:
    wanted = np.rint(np.array(to_rgb(color)) * 255)
    with Image.open(path) as image:
        return int((np.asarray(image) == wanted).all(axis=2).sum())


def rms(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 16), (6, 16)])
def test_code_usage_is_drawn_for_one_codebook_and_for_many(chart, shape):
    counts = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
    plot_code_usage(counts, chart)
    assert rms(chart) == (960, 540) and pixels_of(PALE_RED, chart) == 0


@pytest.mark.parametrize("shape", [(16,), (6, 16)])
def test_codes_that_are_never_used_take_their_share_of_the_usage_chart(chart, shape):
    counts = torch.ones(shape)
    counts[..., 4:8] = 0
    plot_code_usage(counts, chart)
    quarter = 0.25 * 960 * 540
    assert 0.5 * quarter < pixels_of(PALE_RED, chart) < quarter


def test_a_codebook_of_which_one_code_is_used_is_drawn(chart):
    counts = torch.tensor([[0, 7, 0, 0]])
    plot_code_usage(counts, chart)
    plot_codebook([torch.eye(4)], counts, chart)


def test_an_empty_histogram_is_refused(chart):
    with pytest.raises(ValueError, match="empty row"):
        plot_code_usage(torch.zeros(4), chart)


def test_a_dead_code_is_marked_on_the_map_of_its_codebook(chart):
    vectors, counts = torch.randn(9, 4), torch.arange(9)[None]
    plot_codebook([vectors], counts + 1, chart)
    assert pixels_of(RED, chart) == 0
    plot_codebook([vectors], counts, chart)
    assert pixels_of(RED, chart) > 10


def test_a_codebook_has_a_second_panel_of_the_patches_that_its_codes_stand_for(chart):
    vectors, counts = torch.randn(9, 4), torch.ones(1, 9)
    plot_codebook([vectors], counts, chart)
    (width, height), without = rms(chart), pixels_of("#00ff00", chart)
    plot_codebook([vectors], counts, chart, patches=[Image.new("RGB", (4, 4), "#00ff00")] * 9)
    assert rms(chart) == (2 * width, height) and without == 0
    assert pixels_of("#00ff00", chart) > 0.3 * width * height * 9 / 16  # nine of the sixteen cells


def test_several_codebooks_have_a_panel_each(chart):
    plot_codebook([torch.randn(5, 3)], torch.ones(1, 5), chart)
    width, height = rms(chart)
    plot_codebook([torch.randn(5, 3)] * 4, torch.ones(4, 5), chart)
    assert rms(chart) == (2 * width, 2 * height)


def test_vectors_and_usage_of_different_codebooks_are_refused(chart):
    with pytest.raises(ValueError, match="2 codebooks and usage of 1"):
        plot_codebook([torch.randn(5, 3)] * 2, torch.ones(1, 5), chart)
    with pytest.raises(ValueError, match="1 patches for 1 codebooks of 5 codes"):
        plot_codebook([torch.randn(5, 3)], torch.ones(1, 5), chart, patches=[Image.new("RGB", (4, 4))])


def test_the_principal_plane_keeps_the_distances_of_points_that_lie_in_a_plane():
    flat = torch.randn(20, 2).double() * torch.tensor([3.0, 1.0])
    turned = flat @ torch.linalg.qr(torch.randn(6, 6).double())[0][:2] + 5
    points, shares = principal_plane(turned)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(flat, flat))
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1]


def test_vectors_of_one_number_lie_on_a_line():
    points, shares = principal_plane(torch.tensor([[1.0], [3.0]]))
    assert points[:, 0].abs().tolist() == [1, 1] and points[:, 1].tolist() == [0, 0] and shares == [1, 0]


def test_points_take_the_cells_nearest_to_them_in_order():
    points = torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.1, 0.0], [1.0, 0.0]])
    cells = assign_to_grid(points, torch.tensor([0, 1, 2, 3]), side=3).tolist()
    assert cells[:2] == [[0, 0], [2, 2]]
    assert cells[2] == [1, 0] and cells[3] in ([2, 0], [1, 1])  # the first has their nearest


def test_curves_have_a_panel_for_every_number_of_the_log(chart):
    plot_curves(LOG[:1], chart)
    width, height = rms(chart)
    plot_curves(LOG, chart)
    assert rms(chart) == (3 * width / 2, height)  # loss, mse, code usage instead of loss, mse


def test_a_log_without_losses_is_refused(chart):
    with pytest.raises(ValueError, match="none of which has a loss"):
        plot_curves([{"step": 1, "learning_rate": 0.1}], chart)
