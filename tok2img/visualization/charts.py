"""Charts of code usage, codebooks and training curves, drawn with matplotlib of the extra `[eval]`.

They use no pyplot, so nothing is shared, shown or left open.
"""

import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizers_vq.quantization.code_usage import perplexity

from .image_sheets import save_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, PALE_RED, GREY = "#2f6db3", "#d1495b", "#f3c9ce", "#8a8a8a"
MAP_BACKGROUND = "#d8d8d8"  # neither white nor black, which patches often are
CROSS: dict[str, Any] = {"marker": "X", "color": RED, "edgecolors": "white", "linewidths": 0.7}
MAX_STEPPED_LINES = 4
CELLS_PER_CODE = 1.5  # of an embedding map: room for the shape of the cloud to show
NOT_DRAWN = {"step", "epoch", "grad_norm", "learning_rate", "total_flos"}


def plot_code_usage(histogram: Tensor, path: str | PathLike[str]) -> None:
    """Save a chart of how often each code is used, the most frequent first, and of how many are never used.

    Args:
        histogram: counts `k`, or `g k` with a row for each codebook; more than four are drawn as a map
        path: image file to write
    """
    counts = torch.atleast_2d(histogram).cpu().double()
    if counts.ndim != 2 or (counts.sum(dim=1) == 0).any():
        raise ValueError(f"got a histogram {tuple(histogram.shape)}, expected counts `k` or `g k` without an empty row")
    share = (counts / counts.sum(dim=1, keepdim=True)).sort(dim=1, descending=True).values
    figure = _figure()
    axes = figure.subplots()
    if len(share) <= MAX_STEPPED_LINES:
        _draw_usage_lines(axes, share)
    else:
        _draw_usage_map(figure, axes, share)
    of_each = "mean " if len(share) > 1 else ""
    axes.set_title(
        f"{int((counts > 0).sum())} of {counts.numel()} codes in use, {of_each}perplexity {perplexity(counts).mean():.1f}"
    )
    save_image(_image(figure), path)


def plot_codebook(
    vectors: Sequence[Tensor],
    usage: Tensor,
    path: str | PathLike[str],
    *,
    patches: Sequence[Image.Image] = (),
) -> None:
    """Save a map of codebooks: their vectors on the plane of their first two principal components, unused ones crossed out.

    Args:
        vectors: the vectors `k d` of each codebook
        usage: how often each code is used, `g k`
        path: image file to write
        patches: of a single codebook, what each code looks like; they are laid out beside it, each as near to its place as others let it
    """
    if len(vectors) != len(usage) or not len(vectors):
        raise ValueError(f"got vectors of {len(vectors)} codebooks and usage of {len(usage)}, expected as many of both")
    if patches and (len(vectors) > 1 or len(patches) != usage.shape[1]):
        raise ValueError(f"got {len(patches)} patches for {len(vectors)} codebooks of {usage.shape[1]} codes")
    figure, panels = _panels(len(vectors) + bool(patches), width=6, height=5.4)
    for number, (axes, each, counts) in enumerate(zip(panels, vectors, usage.cpu(), strict=False), start=1):
        points, shares = principal_plane(each)
        _draw_points(figure, axes, points, counts)
        axes.set_title(f"codebook {number}" if len(vectors) > 1 else f"the vectors of {len(each)} codes")
        axes.set_xlabel(f"first component, {_percent(round(shares[0], 2))} of the variance")
        axes.set_ylabel(f"second component, {_percent(round(shares[1], 2))}")
        if patches:
            _draw_patches(panels[1], points, counts, patches)
    save_image(_image(figure), path)


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Save the curves of a run: a panel for its loss and for each number logged beside it, in training and on held-out data.

    Args:
        log_history: of a `transformers.Trainer`, or what `load_log` read
        path: image file to write
    """
    names = curve_names(log_history)
    if not names:
        raise ValueError(f"got a log of {len(log_history)} entries, none of which has a loss or an eval_loss")
    figure, panels = _panels(len(names), width=4.8, height=3.2)
    for axes, name in zip(panels, names, strict=False):
        _draw_curve(axes, log_history, name)
    panels[0].legend(frameon=False)
    save_image(_image(figure), path)


def curve_names(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    """`loss`, and what else is logged beside it or beside `eval_loss`, in the order of the log."""
    names: list[str] = []
    for entry in log_history:
        if "loss" in entry or "eval_loss" in entry:
            names += [name.removeprefix("eval_") for name in entry if name not in NOT_DRAWN]
    return list(dict.fromkeys(names))


def principal_plane(vectors: Tensor) -> tuple[Tensor, list[float]]:
    """Vectors `k d` -> their places `k 2` along the two directions in which they vary most, and the share of the variance of each."""
    centred = (vectors - vectors.mean(dim=0)).cpu().double()
    centred = torch.nn.functional.pad(centred, (0, max(0, 2 - centred.shape[1])))
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    variances = torch.nn.functional.pad(strengths.square(), (0, 1))[:2]
    directions = torch.nn.functional.pad(directions, (0, 0, 0, 1))[:2]
    explained = variances / strengths.square().sum().clamp_min(1e-12)
    return centred @ directions.T, explained.tolist()


def assign_to_grid(points: Tensor, order: Tensor, *, side: int) -> Tensor:
    """Spread points `k 2` over a square grid: each, in the `order` `k` given, takes the free cell nearest to it.

    Returns:
        Column and row of each point, `k 2`.
    """
    low, high = points.min(dim=0).values, points.max(dim=0).values
    wanted = (points - low) / (high - low).clamp_min(1e-12) * (side - 1)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    free = torch.ones(len(cells), dtype=torch.bool)
    taken = torch.zeros(len(points), 2, dtype=torch.long)
    for index in order.tolist():
        distances = (cells - wanted[index]).square().sum(dim=1).masked_fill(~free, math.inf)
        nearest = int(distances.argmin())
        free[nearest] = False
        taken[index] = cells[nearest]
    return taken


def _draw_usage_lines(axes: "Axes", share: Tensor) -> None:
    """Shares `g k`, sorted, as steps; a single codebook's are filled."""
    num_codes = share.shape[1]
    for number, row in enumerate(share, start=1):
        used = row[row > 0].numpy()
        single = len(share) == 1
        axes.stairs(
            used,
            baseline=used.min() / 2,
            fill=single,
            color=BLUE if single else f"C{number - 1}",
            label=None if single else f"codebook {number}: {len(used)} in use",
        )
    num_unused = int((share[0] == 0).sum())
    if len(share) == 1 and num_unused:
        axes.axvspan(num_codes - num_unused, num_codes, color=PALE_RED, lw=0, label=f"{num_unused} never used")
    axes.axhline(1 / num_codes, color=GREY, linestyle="--", linewidth=1, label="if all were used alike")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_percent)
    axes.set(xlim=(0, num_codes), xlabel="codes, most used first", ylabel="share of all codes")
    axes.legend(loc="upper right", framealpha=1)


def _draw_usage_map(figure: "Figure", axes: "Axes", share: Tensor) -> None:
    """Shares `g k`, sorted, a row for each codebook."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    num_groups, num_codes = share.shape
    image = axes.imshow(
        np.ma.masked_equal(share.numpy(), 0),
        aspect="auto",
        interpolation="nearest",
        norm=LogNorm(),
        extent=(0, num_codes, num_groups + 0.5, 0.5),
    )
    axes.set_facecolor(PALE_RED)
    figure.colorbar(image, label="share of the codes of a codebook", format=_percent)
    axes.set(xlabel="codes, most used first", ylabel="codebook")
    axes.locator_params(axis="y", integer=True)
    if (share == 0).any():
        axes.legend(handles=[Patch(color=PALE_RED, label="never used")], loc="lower right")


def _draw_points(figure: "Figure", axes: "Axes", points: Tensor, counts: Tensor) -> None:
    """Codes as dots at `k 2`, coloured by their counts `k`; those of count 0 as crosses."""
    from matplotlib.colors import LogNorm

    used = counts > 0
    share = counts[used] / counts.sum()
    x, y = points.unbind(dim=1)
    size = min(22, 12_000 / len(points))
    dots = axes.scatter(x[used], y[used], c=share, norm=LogNorm(), s=size, linewidths=0)
    figure.colorbar(dots, ax=axes, label="share of all codes", format=_percent)
    if not used.all():
        label = f"{int((~used).sum())} never used"
        axes.scatter(x[~used], y[~used], **CROSS, label=label, s=2 * size)
        axes.legend(framealpha=1)
    axes.grid(alpha=0.3)


def _draw_patches(axes: "Axes", points: Tensor, counts: Tensor, patches: Sequence[Image.Image]) -> None:
    """Patches spread over a grid, each near its point `k 2`; those of count 0 crossed out."""
    side = math.ceil(math.sqrt(CELLS_PER_CODE * len(points)))
    cells = assign_to_grid(points, counts.argsort(descending=True, stable=True), side=side)
    width, height = patches[0].size
    scale = max(1, -(-24 // width))
    pitch_x, pitch_y = width * scale + 2, height * scale + 2
    canvas = Image.new("RGB", (side * pitch_x, side * pitch_y), MAP_BACKGROUND)
    for (column, row), patch in zip(cells.tolist(), patches, strict=True):
        enlarged = patch.convert("RGB").resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (column * pitch_x + 1, (side - 1 - row) * pitch_y + 1))
    axes.imshow(np.asarray(canvas), extent=(-0.5, side - 0.5, -0.5, side - 0.5), interpolation="antialiased")
    unused = cells[counts == 0]
    axes.scatter(*unused.unbind(dim=1), s=min(44, (160 / side) ** 2), **CROSS)
    axes.set(xticks=[], yticks=[], title="the same codes as patches, near their places")


def _draw_curve(axes: "Axes", log_history: Sequence[Mapping[str, Any]], name: str) -> None:
    """One number over the steps; gaps where it was not finite."""
    drawn: list[float] = []
    for key, label, color in ((name, "training", BLUE), (f"eval_{name}", "held out", RED)):
        points = [
            (entry["step"], math.nan if entry[key] is None else entry[key]) for entry in log_history if key in entry
        ]
        if points:
            few = len(points) < 30
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker="o" if few else None, ms=3, lw=1.3)
        drawn += [value for _, value in points if math.isfinite(value)]
    if name.endswith(("usage", "accuracy")):
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(_percent)
    elif name.endswith(("loss", "mse")) and drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axes.set_yscale("log", subs=())
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # type: ignore[reportCallIssue]
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=name.replace("_", " "), xlabel="step")
    axes.grid(alpha=0.3)


def _percent(value: float, _: float = 0) -> str:
    return f"{100 * value:.3g} %"


def _figure(*, width: float = 8, height: float = 4.5) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install 'tok2img[eval]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _panels(num: int, *, width: float, height: float) -> tuple["Figure", list["Axes"]]:
    """A figure of panels of `width` by `height` inches, up to three in one row, else in about a square; those left over stay blank."""
    columns = num if num <= 3 else math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    figure = _figure(width=width * columns, height=height * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[num:]:
        axes.set_axis_off()
    return figure, panels


def _image(figure: "Figure") -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")
