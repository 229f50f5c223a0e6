"""Charts of code usage, codebooks and training curves, with matplotlib of the extra `[eval]`.

They use `Figure` instead of pyplot, which would keep global state and leave figures open.
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
MAP_BACKGROUND = "#d8d8d8"  # gray, because patches are often white or black
CROSS: dict[str, Any] = {"marker": "X", "color": RED, "edgecolors": "white", "linewidths": 0.7}
MAX_STEPPED_LINES = 4
CELLS_PER_CODE = 1.5  # of a map of patches; the empty cells let the shape of the distribution show
NOT_PLOTTED = {"step", "epoch", "grad_norm", "learning_rate", "total_flos"}


def plot_code_usage(histogram: Tensor, path: str | PathLike[str]) -> None:
    """Plot how often each code is used, the most frequent first, and how many are never used.

    Args:
        histogram: Counts, `k`, or `g k` with a row for each codebook. More than four codebooks are
            plotted as a heat map.
        path: Image file to write.

    Raises:
        ValueError: For an empty row, or another shape.
    """
    counts = torch.atleast_2d(histogram).cpu().double()
    if counts.ndim != 2 or (counts.sum(dim=1) == 0).any():
        raise ValueError(f"Expected counts `k` or `g k` without an empty row, got shape {tuple(histogram.shape)}.")
    share = (counts / counts.sum(dim=1, keepdim=True)).sort(dim=1, descending=True).values
    figure = _create_figure()
    axes = figure.subplots()
    if len(share) <= MAX_STEPPED_LINES:
        _plot_usage_lines(axes, share)
    else:
        _plot_usage_map(figure, axes, share)
    prefix = "mean " if len(share) > 1 else ""
    axes.set_title(
        f"{int((counts > 0).sum())} of {counts.numel()} codes in use, {prefix}perplexity {perplexity(counts).mean():.1f}"
    )
    save_image(_render(figure), path)


def plot_codebook(
    vectors: Sequence[Tensor],
    usage: Tensor,
    path: str | PathLike[str],
    *,
    patches: Sequence[Image.Image] = (),
) -> None:
    """Plot codebooks: their vectors projected onto the first two principal components, with dead codes crossed out.

    Args:
        vectors: Vectors of each codebook, `k d`.
        usage: How often each code is used, `g k`.
        path: Image file to write.
        patches: For a single codebook, an image of each code. They are laid out in a second panel,
            each in a grid cell near
            its projected position.

    Raises:
        ValueError: If the numbers of vectors, counts and patches do not match.
    """
    if len(vectors) != len(usage) or not len(vectors):
        raise ValueError(
            f"Expected vectors and usage of the same codebooks, got {len(vectors)} codebooks and usage of {len(usage)}."
        )
    if patches and (len(vectors) > 1 or len(patches) != usage.shape[1]):
        raise ValueError(
            f"Expected a patch for each code of a single codebook, got {len(patches)} patches for {len(vectors)} codebooks "
            f"of {usage.shape[1]} codes."
        )
    figure, panels = _create_panels(len(vectors) + bool(patches), width=6, height=5.4)
    for number, (axes, each, counts) in enumerate(zip(panels, vectors, usage.cpu(), strict=False), start=1):
        points, shares = principal_plane(each)
        _plot_points(figure, axes, points, counts)
        axes.set_title(f"codebook {number}" if len(vectors) > 1 else f"vectors of {len(each)} codes")
        axes.set_xlabel(f"first component, {_format_percent(round(shares[0], 2))} of the variance")
        axes.set_ylabel(f"second component, {_format_percent(round(shares[1], 2))}")
        if patches:
            _plot_patches(panels[1], points, counts, patches)
    save_image(_render(figure), path)


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Plot the training curves of a run: the loss and every other logged number, in training and on held-out data.

    Args:
        log_history: The `log_history` of a `transformers.Trainer`, or the result of `load_log`.
        path: Image file to write.

    Raises:
        ValueError: For a log without a loss.
    """
    names = curve_names(log_history)
    if not names:
        raise ValueError(
            f"Expected a log with a loss or an eval_loss, got {len(log_history)} entries, none of which has a loss."
        )
    figure, panels = _create_panels(len(names), width=4.8, height=3.2)
    for axes, name in zip(panels, names, strict=False):
        _plot_curve(axes, log_history, name)
    panels[0].legend(frameon=False)
    save_image(_render(figure), path)


def curve_names(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the numbers that are logged together with `loss` or `eval_loss`, in the order of the log."""
    names: list[str] = []
    for entry in log_history:
        if "loss" in entry or "eval_loss" in entry:
            names += [name.removeprefix("eval_") for name in entry if name not in NOT_PLOTTED]
    return list(dict.fromkeys(names))


def principal_plane(vectors: Tensor) -> tuple[Tensor, list[float]]:
    """Project vectors onto their first two principal components.

    Args:
        vectors: Vectors, `k d`.

    Returns:
        The projections, `k 2`, and the fraction of the variance that each component explains.
    """
    centered = (vectors - vectors.mean(dim=0)).cpu().double()
    # Zeros fill up what is missing: a dimension where d is 1, a component where k is 1.
    centered = torch.nn.functional.pad(centered, (0, max(0, 2 - centered.shape[1])))
    _, strengths, directions = torch.linalg.svd(centered, full_matrices=False)
    variances = torch.nn.functional.pad(strengths.square(), (0, 1))[:2]
    directions = torch.nn.functional.pad(directions, (0, 0, 0, 1))[:2]
    explained = variances / strengths.square().sum().clamp_min(1e-12)
    return centered @ directions.T, explained.tolist()


def assign_to_grid(points: Tensor, order: Tensor, *, side: int) -> Tensor:
    """Assign points to different cells of a square grid: one after another, each takes the nearest free cell.

    Args:
        points: Points, `k 2`.
        order: Order in which they choose, `k` indices.
        side: Number of rows and columns of the grid.

    Returns:
        Column and row of each point, `k 2`.
    """
    low, high = points.min(dim=0).values, points.max(dim=0).values
    targets = (points - low) / (high - low).clamp_min(1e-12) * (side - 1)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    is_free = torch.ones(len(cells), dtype=torch.bool)
    assigned = torch.zeros(len(points), 2, dtype=torch.long)
    for index in order.tolist():
        distances = (cells - targets[index]).square().sum(dim=1).masked_fill(~is_free, math.inf)
        nearest = int(distances.argmin())
        is_free[nearest] = False
        assigned[index] = cells[nearest]
    return assigned


def _plot_usage_lines(axes: "Axes", share: Tensor) -> None:
    """Plot sorted code frequencies `g k` as steps; those of a single codebook are filled."""
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
    axes.axhline(1 / num_codes, color=GREY, linestyle="--", linewidth=1, label="uniform usage")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_format_percent)
    axes.set(xlim=(0, num_codes), xlabel="codes, most frequent first", ylabel="fraction of all codes")
    axes.legend(loc="upper right", framealpha=1)


def _plot_usage_map(figure: "Figure", axes: "Axes", share: Tensor) -> None:
    """Plot sorted code frequencies `g k` as a heat map with a row for each codebook."""
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
    figure.colorbar(image, label="fraction of the codes of a codebook", format=_format_percent)
    axes.set(xlabel="codes, most frequent first", ylabel="codebook")
    axes.locator_params(axis="y", integer=True)
    if (share == 0).any():
        axes.legend(handles=[Patch(color=PALE_RED, label="never used")], loc="lower right")


def _plot_points(figure: "Figure", axes: "Axes", points: Tensor, counts: Tensor) -> None:
    """Plot codes as dots at `k 2`, colored by their counts `k`; dead codes are crosses."""
    from matplotlib.colors import LogNorm

    used = counts > 0
    share = counts[used] / counts.sum()
    x, y = points.unbind(dim=1)
    size = min(22, 12_000 / len(points))
    dots = axes.scatter(x[used], y[used], c=share, norm=LogNorm(), s=size, linewidths=0)
    figure.colorbar(dots, ax=axes, label="fraction of all codes", format=_format_percent)
    if not used.all():
        label = f"{int((~used).sum())} never used"
        axes.scatter(x[~used], y[~used], **CROSS, label=label, s=2 * size)
        axes.legend(framealpha=1)
    axes.grid(alpha=0.3)


def _plot_patches(axes: "Axes", points: Tensor, counts: Tensor, patches: Sequence[Image.Image]) -> None:
    """Plot patches on a grid, each near its point `k 2`; those of dead codes are crossed out."""
    side = math.ceil(math.sqrt(CELLS_PER_CODE * len(points)))
    # Frequent codes choose first, so that they lie nearest to their points.
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
    axes.set(xticks=[], yticks=[], title="the same codes as patches, near their positions")


def _plot_curve(axes: "Axes", log_history: Sequence[Mapping[str, Any]], name: str) -> None:
    """Plot one number over the steps, with gaps where it is not finite."""
    plotted: list[float] = []
    for key, label, color in ((name, "training", BLUE), (f"eval_{name}", "held out", RED)):
        points = [
            (entry["step"], math.nan if entry[key] is None else entry[key]) for entry in log_history if key in entry
        ]
        if points:
            few = len(points) < 30
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker="o" if few else None, ms=3, lw=1.3)
        plotted += [value for _, value in points if math.isfinite(value)]
    if name.endswith(("usage", "accuracy")):
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(_format_percent)
    elif name.endswith(("loss", "mse")) and plotted and min(plotted) > 0 and max(plotted) > 10 * min(plotted):
        axes.set_yscale("log", subs=())
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # type: ignore[reportCallIssue]
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=name.replace("_", " "), xlabel="step")
    axes.grid(alpha=0.3)


def _format_percent(value: float, _: float = 0) -> str:
    """Format a fraction as a percentage; the second argument is the tick position of matplotlib formatters."""
    return f"{100 * value:.3g} %"


def _create_figure(*, width: float = 8, height: float = 4.5) -> "Figure":
    """Create a figure of a size in inches; ImportError with the way out if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install 'tok2img[eval]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _create_panels(num: int, *, width: float, height: float) -> tuple["Figure", list["Axes"]]:
    """Create a figure of panels: up to three in one row, more in about a square, with unused cells blank.

    Args:
        num: Number of panels.
        width: Width of a panel, in inches.
        height: Height of a panel, in inches.
    """
    columns = num if num <= 3 else math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    figure = _create_figure(width=width * columns, height=height * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[num:]:
        axes.set_axis_off()
    return figure, panels


def _render(figure: "Figure") -> Image.Image:
    """Render a figure as an image."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")
