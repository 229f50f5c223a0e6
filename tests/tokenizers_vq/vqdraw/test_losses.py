"""Stage losses, compared with torch's distributions."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from tokenizers_vq import VQDrawForImages, VQDrawImageConfig
from tokenizers_vq.vqdraw.losses import BCELoss, GaussianNLLLoss, MSELoss
from tokenizers_vq.vqdraw.options import DenseOptions

TARGET, SHAPE = (5, 2, 4, 4), (5, 6, 2, 4, 4)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_gaussian_nll_loss_equals_torchs_log_likelihood():
    steps, state, target = random(5, 6, 4, 4, 4), random(5, 4, 4, 4), random(*TARGET)
    mean, log_std = (state[:, None] + steps).split(2, dim=2)
    expected = -Normal(mean, log_std.exp()).log_prob(target[:, None]).flatten(2).mean(dim=2)
    torch.testing.assert_close(GaussianNLLLoss()(DenseOptions(steps), state, target), expected)


def test_bce_loss_equals_torchs_log_likelihood():
    steps, state, pixels = random(*SHAPE), random(*TARGET), torch.rand(TARGET, dtype=torch.float64).round()
    stage_loss = BCELoss(SimpleNamespace(pixel_mean=0.3, pixel_std=0.2))
    expected = -Bernoulli(logits=state[:, None] + steps).log_prob(pixels[:, None]).flatten(2).mean(dim=2)
    torch.testing.assert_close(stage_loss(DenseOptions(steps), state, (pixels - 0.3) / 0.2), expected)


@pytest.mark.parametrize("stage_loss", [MSELoss(), GaussianNLLLoss(), BCELoss(VQDrawImageConfig())])
def test_target_state_reconstructs_the_target(stage_loss):
    target = (torch.rand(TARGET).round() - 0.5) / 0.25
    state = stage_loss.target_state(target)
    assert state.shape[1] == stage_loss.channel_multiplier * target.shape[1]
    torch.testing.assert_close(stage_loss.reconstruct(state), target, atol=0.2, rtol=0)


@pytest.mark.parametrize("stage_loss", ["gaussian_nll", "bce"])
def test_model_of_every_loss_trains_and_decodes_to_its_reconstruction(stage_loss, images, tmp_path):
    config = VQDrawImageConfig(
        image_size=8, num_stages=3, codebook_size=4, hidden_channels=16, feature_channels=8, stage_loss=stage_loss
    )
    model, pixels = VQDrawForImages(config), images.round() if stage_loss == "bce" else images
    model.init_from_data(pixels)
    before = model(pixels).loss.item()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(pixels).loss.backward()
        optimizer.step()
    output = model.eval()(pixels)
    assert output.loss < before - 0.02
    assert torch.equal(model.decode(output.codes), output.reconstruction)
    assert (output.reconstruction - pixels).square().mean() < 0.6 * (pixels.mean(0) - pixels).square().mean()
    model.save_pretrained(tmp_path)
    assert torch.equal(VQDrawForImages.from_pretrained(tmp_path).encode(pixels), output.codes)


def test_unknown_stage_loss_raises():
    with pytest.raises(ValueError, match="stage_loss must be one of mse, gaussian_nll, bce, got 'cubic'"):
        VQDrawImageConfig(stage_loss="cubic")
