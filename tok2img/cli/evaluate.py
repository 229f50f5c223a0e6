"""The command `tok2img evaluate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import CaptionColumn, ImageColumn, MaxSamples
from .output import silence_transformers


def evaluate(
    data: Annotated[str, typer.Option(help="Data set to evaluate on; see `tok2img tokenize --help`.")],
    out: Annotated[str, typer.Option(help="JSON file to write.")],
    figures: Annotated[
        str, typer.Option(help="Folder for figures. Default: next to --out, e.g. report_figures for report.json.")
    ] = "",
    model: Annotated[str, typer.Option(help="Folder of a trained model.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Folder of an image tokenizer or of a VQ text tokenizer.")] = "",
    tokens: Annotated[
        str,
        typer.Option(help="Folder of the training tokens, to measure the memorization rate. Default: not measured."),
    ] = "",
    verifier: Annotated[
        str,
        typer.Option(
            help="Folder of a caption classifier; if there is none, it is trained on the data and saved there. "
            "Default: trained and not saved."
        ),
    ] = "",
    num_images: Annotated[
        int, typer.Option(help="Images to generate for caption accuracy and the Fréchet distance.")
    ] = 1000,
    split: Annotated[
        str, typer.Option(help="Split of the data set. Default: test, or validation if there is none.")
    ] = "",
    image_column: ImageColumn = "",
    caption_column: CaptionColumn = "",
    max_samples: MaxSamples = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the generated images.")] = 0,
) -> None:
    """Evaluate a tokenizer or a model on held-out data, as JSON and figures.

    A tokenizer: reconstruction error and code usage. A model: losses, caption accuracy, Fréchet
        distance and memorization.
    """
    if bool(model) == bool(tokenizer):
        raise ValueError("give either --model or --tokenizer")
    if num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {num_images}")
    silence_transformers()
    from ..evaluation.reports import save_report

    rows = {"split": split, "max_samples": max_samples or None}
    columns = {"image_column": image_column or None, "caption_column": caption_column or None}
    if tokenizer:
        report, save_figures = evaluate_tokenizer(tokenizer, data, **rows, **columns)
    else:
        sampling = {"num_images": num_images, "seed": seed}
        report, save_figures = evaluate_model(
            model, data, rows=rows, columns=columns, tokens=tokens, verifier_folder=verifier, **sampling
        )
    save_report(report, out)  # before plotting, so that an error in a chart does not lose an hour of measuring
    report["figures"] = save_figures(Path(figures or f"{Path(out).with_suffix('')}_figures"))
    print(save_report(report, out))


def evaluate_tokenizer(tokenizer: str, data: str, **rows: Any) -> tuple[dict[str, Any], Callable[[Path], list[str]]]:
    """Evaluate a tokenizer on the images, or the captions, of a data set.

    Args:
        tokenizer: Folder of an image tokenizer or of a VQ text tokenizer.
        data: Data set.
        rows: Arguments of `load_eval_split`.

    Returns:
        The report, and a function that saves its figures to a folder.
    """
    from ..evaluation.reports import load_eval_split, report_on_tokenizer
    from ..tokenization.span_text_tokenizer import is_text_model

    is_text = is_text_model(tokenizer)
    return report_on_tokenizer(tokenizer, load_eval_split(data, with_captions=is_text, with_images=not is_text, **rows))


def evaluate_model(
    model: str, data: str, *, rows: dict[str, Any], columns: dict[str, Any], **settings: Any
) -> tuple[dict[str, Any], Callable[[Path], list[str]]]:
    """Evaluate a trained model on the captioned images of a data set.

    Args:
        model: Folder of the model.
        data: Data set, also the one whose training split a new verifier learns from.
        rows: Arguments of `load_eval_split`, without the columns.
        columns: Names of the image and caption columns.
        settings: Further arguments of `report_on_model`.

    Returns:
        The report, and a function that saves its figures to a folder.
    """
    from ..evaluation.reports import load_eval_split, report_on_model

    return report_on_model(model, load_eval_split(data, **rows, **columns), data=data, **columns, **settings)
