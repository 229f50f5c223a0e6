"""The command line: `tok2img COMMAND`. Commands import what they need when they run, so that help needs no torch."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import silence_transformers
from .train import commands as training_commands

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(training_commands)
UsageError: Any = typer.BadParameter.__base__  # of the click that typer brings along
MOST_NAMED = 5  # rows that were skipped
Data = Annotated[
    str,
    typer.Argument(help="Parquet file or folder, image folder with captions, webdataset tars, hub name, or shapes."),
]
Split = Annotated[str, typer.Option(help="Split of the data.")]
ImageColumn = Annotated[str, typer.Option(help="Column with the images, where it is not plain which.")]
CaptionColumn = Annotated[str, typer.Option(help="Column with the captions, where it is not plain which.")]
MaxRows = Annotated[int, typer.Option(help="Use so many rows at most; 0: all.")]
OnError = Annotated[
    str, typer.Option(help="skip: leave rows out that cannot be read, and list them in manifest.json; raise: stop.")
]
Shard = Annotated[
    str,
    typer.Option(
        help="i/n: do the i-th of n parts, counted from 0, as one of n jobs with the same --out; by default under torchrun."
    ),
]


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for everything the demo makes.")] = "runs/demo",
    quick: Annotated[
        bool, typer.Option(help="A few steps of everything: shows that it runs, not what it can do.")
    ] = False,
) -> None:
    """The whole job on the built-in captioned shapes, in minutes: both tokenizers, a prior, images, figures."""
    from .demo import run_demo

    run_demo(Path(out), quick=quick)


@app.command()
def tokenize(
    data: Data,
    tokenizer: Annotated[str, typer.Option(help="Folder of an image tokenizer.")],
    out: Annotated[str, typer.Option(help="Folder for the tokens.")],
    text_tokenizer: Annotated[
        str,
        typer.Option(help="Folder or hub name of a text tokenizer; without it, that of the base, or BPE is learned."),
    ] = "",
    base_model: Annotated[
        str, typer.Option(help="Folder or hub name of a pretrained language model that is to be the prior.")
    ] = "",
    vocab_size: Annotated[int, typer.Option(help="Of that BPE.")] = 4096,
    text_length: Annotated[
        int, typer.Option(help="Text tokens kept of a caption; 0: as many as the longest has, 64 at most.")
    ] = 0,
    split: Split = "train",
    image_column: ImageColumn = "",
    caption_column: CaptionColumn = "",
    max_samples: MaxRows = 0,
    beam_size: Annotated[
        int, typer.Option(help="Search so wide for VQ-DRAW codes; 0: as the tokenizer's config says.")
    ] = 0,
    search_steps: Annotated[
        int, typer.Option(help="Search so long for codes of a VQ-VAE; 0: as the tokenizer's config says.")
    ] = 0,
    num_proc: Annotated[int, typer.Option(help="Processes.")] = 1,
    on_error: OnError = "skip",
    shard: Shard = "",
) -> None:
    """Turn captioned images into tokens, once, for any number of training runs."""
    silence_transformers()
    from tokenizers_vq.auto import load_image_tokenizer

    from ..data.streaming import stream_captioned_images
    from ..recipes.build_processor import build_processor, set_encode_search
    from ..tokenization.token_dataset import part_of, save_tokens, shard_from_env

    image_tokenizer = load_image_tokenizer(tokenizer)
    set_encode_search(image_tokenizer, beam_size=beam_size, search_steps=search_steps)
    rows = stream_captioned_images(
        data, split=split, image_column=image_column, caption_column=caption_column, max_samples=max_samples
    )
    processor = build_processor(
        rows.captions,
        image_tokenizer,
        text_tokenizer=text_tokenizer,
        base=base_model,
        vocab_size=vocab_size,
        text_length=text_length,
    )
    part = part_of(shard) if shard else shard_from_env()
    manifest = save_tokens(rows, processor, out, num_proc=num_proc, on_error=on_error, part=part)
    if manifest is None:
        print(f"part {part[0]}/{part[1]} is done; {out} appears with the last part")
        return
    layout = processor.layout
    print(f"{manifest['rows']} rows of {layout.text_length} text tokens and {layout.num_codes} codes: {out}")
    report_skipped(manifest, out, text_length=layout.text_length)


def report_skipped(manifest: dict[str, Any], out: str, *, text_length: int) -> None:
    """Name rows that were skipped, and count captions that were cut."""
    for skipped in manifest["skipped"][:MOST_NAMED]:
        print(f"skipped row {skipped['row']}: {skipped['reason']}")
    if len(manifest["skipped"]) > MOST_NAMED:
        print(f"... {len(manifest['skipped'])} rows in all, see {out}/manifest.json")
    if manifest["num_truncated_captions"]:
        print(f"{manifest['num_truncated_captions']} captions were longer than {text_length} text tokens and were cut")


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder of a trained model.")],
    out: Annotated[str, typer.Option(help="Image file to write: a sheet when there are several images.")],
    captions: Annotated[list[str] | None, typer.Argument(help="One caption or more.")] = None,
    num_images: Annotated[int, typer.Option(help="Images of each caption.")] = 1,
    stages: Annotated[bool, typer.Option(help="Show each image after its first codes, and after more.")] = False,
    random_codes: Annotated[bool, typer.Option(help="Decode codes drawn at random: no prior, no caption.")] = False,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same images.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strongly to follow the caption; the model's own by default.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest code.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest codes; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest codes with this probability together.")
    ] = None,
    best_of: Annotated[int, typer.Option(help="Draw so many for each image and keep the best.")] = 1,
    ranker: Annotated[
        str,
        typer.Option(help="Folder or hub name of the CLIP model that says which is best; else the model's own odds."),
    ] = "",
) -> None:
    """Draw images of captions."""
    silence_transformers()
    from ..visualization.image_sheets import check_suffix

    check_suffix(out)
    if bool(captions) == random_codes:
        raise ValueError("give either captions or --random-codes")
    choices = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if not random_codes:
        choices |= {"seed": seed, "best_of": best_of, "num_images_per_prompt": num_images}
        draw_captions(model, out, captions or [], stages=stages, ranker=ranker, **choices)
    elif best_of != 1 or ranker or any(choice is not None for choice in choices.values()):
        raise ValueError("--random-codes takes --num-images, --stages and --seed: there is no prior to guide or choose")
    else:
        draw_random_codes(model, out, num_images=num_images, stages=stages, seed=seed)
    print(out)


def draw_captions(model: str, out: str, prompts: list[str], *, stages: bool, ranker: str, **choices: Any) -> None:
    """A sheet of what a trained model makes of captions; `choices` are those of `TextToImagePipeline.__call__`."""
    from ..device import to_device
    from ..pipelines.clip_ranker import ClipRanker
    from ..pipelines.text_to_image import TextToImagePipeline
    from ..visualization.image_sheets import captioned_sheet, save_image
    from ..visualization.tokenizer_sheets import stages_sheet

    pipeline = to_device(TextToImagePipeline.from_pretrained(model))
    clip_ranker = ClipRanker.from_pretrained(ranker) if ranker else None
    output = pipeline(prompts, ranker=clip_ranker, progress=True, **choices)
    images: Any = output.images
    if stages:
        sheet = stages_sheet(pipeline.processor.image_tokenizer, output.codes)
    elif len(images) == 1:
        sheet = images[0]
    else:
        labels = [caption for caption in prompts for _ in range(len(images) // len(prompts))]
        sheet = captioned_sheet(images, labels, columns=min(8, len(images)))
    save_image(sheet, out)


def draw_random_codes(model: str, out: str, *, num_images: int, stages: bool, seed: int | None) -> None:
    """A sheet of images of random codes, by the image tokenizer of a trained model or one of its own folder."""
    from tokenizers_vq.auto import load_image_tokenizer
    from tokenizers_vq.images.processing import images_from_pixels

    from ..tokenization.processor import IMAGE_TOKENIZER_FOLDER
    from ..visualization.image_sheets import image_grid, save_image
    from ..visualization.tokenizer_sheets import random_codes, stages_sheet

    inner = Path(model, IMAGE_TOKENIZER_FOLDER)
    image_tokenizer = load_image_tokenizer(inner if inner.is_dir() else model)
    codes = random_codes(image_tokenizer, num_images, seed=seed)
    if stages:
        sheet = stages_sheet(image_tokenizer, codes)
    else:
        sheet = image_grid(images_from_pixels(image_tokenizer.decode(codes)), min(8, num_images))
    save_image(sheet, out)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Folder or hub name of a trained model.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 7860,
    share: Annotated[bool, typer.Option(help="Make a public address too, through gradio's own servers.")] = False,
) -> None:
    """Serve a web page that draws images of captions, completes images and shows their codes."""
    silence_transformers()
    try:
        from ..serving.web_page import build_page, serve_page
    except ImportError as error:
        raise ValueError("the page needs gradio, which is not installed: pip install 'tok2img[demo]'") from error
    from ..device import to_device
    from ..pipelines.text_to_image import TextToImagePipeline

    page = build_page(to_device(TextToImagePipeline.from_pretrained(model)), name="/".join(Path(model).parts[-2:]))
    print(f"{serve_page(page, host=host, port=port, share=share)}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


@app.command()
def caption(
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    model: Annotated[str, typer.Option(help="Folder of a model trained with --image-to-text-fraction.")],
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest words.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many of the likeliest text tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest text tokens with this probability together.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same captions.")] = None,
) -> None:
    """Say what images show: a caption a line."""
    silence_transformers()
    from ..device import to_device
    from ..pipelines.image_to_text import ImageToTextPipeline

    pipeline = to_device(ImageToTextPipeline.from_pretrained(model))
    for text in pipeline(images, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
        print(" ".join(text.split()))


@app.command()
def reconstruct(
    sources: Annotated[list[str], typer.Argument(help="A data set, or image files; texts for a model of text.")],
    tokenizer: Annotated[str, typer.Option(help="Folder of an image tokenizer, or of a model of text.")],
    out: Annotated[str, typer.Option(help="Image file to write; a .txt file for texts.")],
    num_images: Annotated[int, typer.Option(help="Images, or texts, of a data set.")] = 16,
    stages: Annotated[
        bool, typer.Option(help="Show each image after its first codes, and after more of them.")
    ] = False,
    split: Split = "train",
) -> None:
    """Show images above what is left of them after encoding and decoding; texts stage by stage, and texts of random codes."""
    if num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {num_images}")
    silence_transformers()
    from tokenizers_vq.auto import load_image_tokenizer

    from ..data.images import load_pixels
    from ..data.loading import load_images_or_paths
    from ..device import to_device
    from ..tokenization.span_text_tokenizer import is_text_model
    from ..visualization.image_sheets import check_suffix, save_image
    from ..visualization.text_sheets import write_text_sheet
    from ..visualization.tokenizer_sheets import reconstructions_sheet, stages_sheet

    if is_text_model(tokenizer):
        write_text_sheet(tokenizer, sources, out, split=split, num_texts=num_images)
        print(out)
        return
    image_tokenizer = to_device(load_image_tokenizer(tokenizer))
    check_suffix(out)
    images = load_images_or_paths(sources, split=split, num_images=num_images)
    if stages:
        codes = image_tokenizer.encode(load_pixels(images, image_tokenizer).to(image_tokenizer.device))
        save_image(stages_sheet(image_tokenizer, codes), out)
    else:
        save_image(reconstructions_sheet(image_tokenizer, images), out)
    print(out)


@app.command()
def evaluate(
    data: Annotated[str, typer.Option(help="Data set to measure on.")],
    out: Annotated[str, typer.Option(help="JSON file to write.")],
    figures: Annotated[
        str, typer.Option(help="Folder for figures; by default metrics_figures next to a metrics.json.")
    ] = "",
    model: Annotated[str, typer.Option(help="Folder of a trained model.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Folder of an image tokenizer, or of a model of text.")] = "",
    tokens: Annotated[
        str, typer.Option(help="Folder of the training tokens: counts images that repeat one of them.")
    ] = "",
    verifier: Annotated[
        str, typer.Option(help="Folder of a classifier of captions; trained on the data, and saved there, when new.")
    ] = "",
    num_images: Annotated[int, typer.Option(help="Images to draw for caption accuracy and Fréchet distance.")] = 1000,
    split: Annotated[str, typer.Option(help="Split of the data; its test or validation split by default.")] = "",
    image_column: ImageColumn = "",
    caption_column: CaptionColumn = "",
    max_samples: MaxRows = 2000,
    seed: Annotated[int, typer.Option(help="Of the images drawn.")] = 0,
) -> None:
    """Measure a tokenizer, or a model, and draw it: losses, accuracy both ways, Fréchet distance, repeats; sheets, code usage, curves."""
    if bool(model) == bool(tokenizer):
        raise ValueError("give either --model or --tokenizer")
    if num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {num_images}")
    silence_transformers()
    from ..evaluation.reports import load_eval_split, report_on_model, report_on_tokenizer, save_report
    from ..tokenization.span_text_tokenizer import is_text_model

    of_text = bool(tokenizer) and is_text_model(tokenizer)
    columns = {"image_column": image_column or None, "caption_column": caption_column or None}
    rows = load_eval_split(
        data,
        split=split,
        with_captions=bool(model) or of_text,
        with_images=not of_text,
        max_samples=max_samples or None,
        **columns,
    )
    if tokenizer:
        report, draw = report_on_tokenizer(tokenizer, rows)
    else:
        report, draw = report_on_model(
            model, rows, data=data, tokens=tokens, verifier_folder=verifier, num_images=num_images, seed=seed, **columns
        )
    save_report(report, out)  # before drawing: figures that took an hour are not lost to a chart
    report["figures"] = draw(Path(figures or f"{Path(out).with_suffix('')}_figures"))
    print(save_report(report, out))


def main() -> None:
    """Run the command line: errors that a user can mend are one line, and exit code 2."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (UsageError, ValueError, OSError) as error:
        message = getattr(error, "format_message", error.__str__)()
        print(f"tok2img: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
