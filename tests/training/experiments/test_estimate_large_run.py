"""The plan for large runs follows from its rates."""


def test_each_stage_takes_what_its_rate_says(script, monkeypatch):
    scale = script("experiments/estimate_large_run")
    monkeypatch.setattr(scale, "GPU_FLOPS", 1e12)
    stages = scale.plan(
        num_images=3.6e6,
        reading=scale.Rate(0, 0.01),
        encoding=scale.Rate(1e9, 0.1),
        flops_per_token=1e9,
        tokens=100,
        row_bytes=500,
    )
    assert stages["read"].startswith("10 core hours") and stages["encode on cores"].startswith("100 core hours")
    assert stages["encode on GPUs"] == "1 GPU hours, if 10 cores read for each"
    assert stages["train, once over all"].startswith("100 GPU hours") and stages["store tokens"].startswith("0.0018 TB")


def test_a_rate_counts_operations_and_seconds_of_an_item(script):
    scale = script("experiments/estimate_large_run")
    matrix = scale.torch.ones(8, 8)
    rate = scale.rate_of(lambda: matrix @ matrix, num_items=8)
    assert rate.flops == 2 * 8 * 8 and rate.seconds > 0
