"""Train tokenizers and priors, and generate images from captions."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .evaluate import evaluate
from .options import CaptionColumn, Data, ImageColumn, MaxSamples, OnError, Shard, Split
from .output import silence_transformers
from .train import commands as training_commands

# Commands import what they need when they run, so that `--help` does not import torch.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(training_commands)
UsageError: Any = typer.BadParameter.__base__  # of the click that typer depends on
MAX_LISTED_ROWS = 5  # of the skipped rows


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for all results of the demo.")] = "runs/demo",
    quick: Annotated[bool, typer.Option(help="Run every stage for a few steps only, as a smoke test.")] = False,
) -> None:
    """Run the whole pipeline on the built-in captioned shapes, in minutes: tokenizers, prior, images and figures."""
    from .demo import run_demo

    run_demo(Path(out), quick=quick)


@app.command()
def tokenize(
    data: Data,
    tokenizer: Annotated[str, typer.Option(help="Folder of an image tokenizer.")],
    out: Annotated[str, typer.Option(help="Folder to write the tokens to.")],
    text_tokenizer: Annotated[
        str,
        typer.Option(
            help="Folder or hub name of a text tokenizer. "
            "Default: the tokenizer of --base-model, or a BPE trained on the captions."
        ),
    ] = "",
    base_model: Annotated[
        str,
        typer.Option(
            help="Folder or hub name of a pretrained language model that the prior will be built from. Default: none."
        ),
    ] = "",
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size of a BPE that is trained here.")] = 4096,
    text_length: Annotated[
        int,
        typer.Option(
            help="Text tokens per caption; longer captions are truncated (0 = the longest caption, at most 64)."
        ),
    ] = 0,
    split: Split = "train",
    image_column: ImageColumn = "",
    caption_column: CaptionColumn = "",
    max_samples: MaxSamples = 0,
    beam_size: Annotated[int, typer.Option(help="Beam size for VQ-DRAW codes (0 = the tokenizer's default).")] = 0,
    search_steps: Annotated[
        int, typer.Option(help="Optimization steps for better VQ-VAE codes (0 = the tokenizer's default).")
    ] = 0,
    num_proc: Annotated[int, typer.Option(help="Number of worker processes.")] = 1,
    on_error: OnError = "skip",
    shard: Shard = "",
) -> None:
    """Tokenize captioned images once, for any number of training runs."""
    silence_transformers()
    from ..data.streaming import stream_captioned_images
    from ..recipes.build_processor import build_processor
    from ..tokenization.token_dataset import parse_shard, save_tokens

    rows = stream_captioned_images(
        data, split=split, image_column=image_column, caption_column=caption_column, max_samples=max_samples
    )
    processor = build_processor(
        rows.captions,
        tokenizer,
        text_tokenizer=text_tokenizer,
        base_model=base_model,
        vocab_size=vocab_size,
        text_length=text_length,
        beam_size=beam_size,
        search_steps=search_steps,
    )
    if shard:
        shard_index, num_shards = parse_shard(shard)
    else:  # the processes that torchrun started share the job; without torchrun this one does it alone
        shard_index, num_shards = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    manifest = save_tokens(
        rows,
        processor,
        out,
        num_proc=num_proc,
        on_error=on_error,
        shard_index=shard_index,
        num_shards=num_shards,
    )
    if manifest is None:
        print(f"shard {shard_index}/{num_shards} is done; {out} appears when the last shard is done")
        return
    layout = processor.layout
    print(f"{manifest['rows']} rows of {layout.text_length} text tokens and {layout.num_codes} image codes: {out}")
    report_skipped(manifest, out, text_length=layout.text_length)


def report_skipped(manifest: dict[str, Any], out: str, *, text_length: int) -> None:
    """Print the rows that were skipped and the number of captions that were truncated."""
    for skipped in manifest["skipped"][:MAX_LISTED_ROWS]:
        print(f"skipped row {skipped['row']}: {skipped['reason']}")
    if len(manifest["skipped"]) > MAX_LISTED_ROWS:
        print(f"... {len(manifest['skipped'])} rows were skipped in total, see {out}/manifest.json")
    if manifest["num_truncated_captions"]:
        print(
            f"{manifest['num_truncated_captions']} captions were longer than {text_length} text tokens and were truncated"
        )


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder or hub name of a trained model.")],
    out: Annotated[str, typer.Option(help="Image file to write: one image, or a sheet of several.")],
    captions: Annotated[list[str] | None, typer.Argument(help="One or more captions.")] = None,
    num_images: Annotated[int, typer.Option(help="Images per caption.")] = 1,
    stages: Annotated[bool, typer.Option(help="Show each image decoded from growing prefixes of its codes.")] = False,
    random_codes: Annotated[
        bool, typer.Option(help="Decode uniformly random codes, without a prior or a caption.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed; the same seed gives the same images. Default: random.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance (1 = no guidance). Default: the model's own."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature (0 = the most likely code). Default: the model's own.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k most likely codes (0 = all). Default: the model's own.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the smallest set of codes whose total probability is at least p (1 = all). "
            "Default: the model's own."
        ),
    ] = None,
    best_of: Annotated[int, typer.Option(help="Candidates per image, of which the best is kept.")] = 1,
    ranker: Annotated[
        str,
        typer.Option(
            help="Folder or hub name of a CLIP model that ranks the candidates. Default: the prior's own likelihood."
        ),
    ] = "",
) -> None:
    """Generate images from captions."""
    silence_transformers()
    from ..visualization.image_sheets import infer_image_format

    infer_image_format(out)
    if bool(captions) == random_codes:
        raise ValueError("give either captions or --random-codes")
    settings = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if not random_codes:
        settings |= {"seed": seed, "best_of": best_of, "num_images_per_prompt": num_images}
        generate_images(model, out, captions or [], stages=stages, ranker=ranker, **settings)
    elif best_of != 1 or ranker or any(value is not None for value in settings.values()):
        raise ValueError(
            "--random-codes takes only --num-images, --stages and --seed: there is no prior to guide or rank with"
        )
    else:
        render_random_codes(model, out, num_images=num_images, stages=stages, seed=seed)
    print(out)


def generate_images(model: str, out: str, prompts: list[str], *, stages: bool, ranker: str, **settings: Any) -> None:
    """Generate images from captions and save them as one image or a sheet.

    Args:
        model: Folder or hub name of a trained model.
        out: Image file to write.
        prompts: One or more captions.
        stages: Show each image decoded from growing prefixes of its codes.
        ranker: Folder or hub name of a CLIP model, or "".
        settings: Sampling settings, as in `TextToImagePipeline.__call__`.
    """
    from ..device import to_device
    from ..pipelines.clip_ranker import ClipRanker
    from ..pipelines.text_to_image import TextToImagePipeline
    from ..visualization.image_sheets import make_captioned_sheet, save_image
    from ..visualization.tokenizer_sheets import render_stages

    pipeline = to_device(TextToImagePipeline.from_pretrained(model))
    clip_ranker = ClipRanker.from_pretrained(ranker) if ranker else None
    output = pipeline(prompts, ranker=clip_ranker, progress=True, **settings)
    images: Any = output.images
    if stages:
        sheet = render_stages(pipeline.processor.image_tokenizer, output.codes)
    elif len(images) == 1:
        sheet = images[0]
    else:
        labels = [caption for caption in prompts for _ in range(len(images) // len(prompts))]
        sheet = make_captioned_sheet(images, labels, columns=min(8, len(images)))
    save_image(sheet, out)


def render_random_codes(model: str, out: str, *, num_images: int, stages: bool, seed: int | None) -> None:
    """Save images decoded from random codes; `model` is the folder of a trained model or of an image tokenizer."""
    from tokenizers_vq.auto import load_image_tokenizer
    from tokenizers_vq.images.processing import images_from_pixels

    from ..tokenization.processor import IMAGE_TOKENIZER_FOLDER
    from ..visualization.image_sheets import make_image_grid, save_image
    from ..visualization.tokenizer_sheets import render_stages, sample_random_codes

    inner = Path(model, IMAGE_TOKENIZER_FOLDER)
    image_tokenizer = load_image_tokenizer(inner if inner.is_dir() else model)
    codes = sample_random_codes(image_tokenizer, num_images, seed=seed)
    if stages:
        sheet = render_stages(image_tokenizer, codes)
    else:
        sheet = make_image_grid(images_from_pixels(image_tokenizer.decode(codes)), min(8, num_images))
    save_image(sheet, out)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Folder or hub name of a trained model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    share: Annotated[bool, typer.Option(help="Also create a public link, through the servers of gradio.")] = False,
) -> None:
    """Serve a web page that generates images from captions, completes images and shows their codes."""
    silence_transformers()
    try:
        from ..serving.web_page import build_page, serve_page
    except ImportError as error:
        raise ValueError("The web page needs gradio, which is not installed: pip install 'tok2img[demo]'") from error
    from ..device import to_device
    from ..pipelines.text_to_image import TextToImagePipeline

    page = build_page(to_device(TextToImagePipeline.from_pretrained(model)), name="/".join(Path(model).parts[-2:]))
    print(f"{serve_page(page, host=host, port=port, share=share)}   (Ctrl-C to stop)", flush=True)
    page.block_thread()


@app.command()
def caption(
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    model: Annotated[str, typer.Option(help="Folder of a model trained with --image-to-text-fraction.")],
    temperature: Annotated[float, typer.Option(help="Sampling temperature (0 = the most likely text token).")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely text tokens (0 = all).")] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the smallest set of text tokens whose total probability is at least p (1 = all)."
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed; the same seed gives the same captions. Default: random.")
    ] = None,
) -> None:
    """Caption images: print one caption per line."""
    silence_transformers()
    from ..device import to_device
    from ..pipelines.image_to_text import ImageToTextPipeline

    pipeline = to_device(ImageToTextPipeline.from_pretrained(model))
    for text in pipeline(images, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
        print(" ".join(text.split()))


@app.command()
def reconstruct(
    sources: Annotated[
        list[str], typer.Argument(help="A data set, or image files. For a text tokenizer: a data set, or texts.")
    ],
    tokenizer: Annotated[str, typer.Option(help="Folder of an image tokenizer or of a VQ text tokenizer.")],
    out: Annotated[str, typer.Option(help="Image file to write; a .txt file for texts.")],
    num_images: Annotated[int, typer.Option(help="Number of images or texts to take from a data set.")] = 16,
    stages: Annotated[bool, typer.Option(help="Show each image decoded from growing prefixes of its codes.")] = False,
    split: Split = "train",
) -> None:
    """Reconstruct images or texts from their codes: originals above reconstructions, or texts stage by stage."""
    if num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {num_images}")
    silence_transformers()
    from tokenizers_vq.auto import load_image_tokenizer

    from ..data.images import load_pixels
    from ..data.loading import load_images_or_paths
    from ..device import to_device
    from ..tokenization.span_text_tokenizer import is_text_model
    from ..visualization.image_sheets import infer_image_format, save_image
    from ..visualization.text_sheets import save_text_sheet
    from ..visualization.tokenizer_sheets import render_reconstructions, render_stages

    if is_text_model(tokenizer):
        save_text_sheet(tokenizer, sources, out, split=split, num_texts=num_images)
        print(out)
        return
    image_tokenizer = to_device(load_image_tokenizer(tokenizer))
    infer_image_format(out)
    images = load_images_or_paths(sources, split=split, num_images=num_images)
    if stages:
        codes = image_tokenizer.encode(load_pixels(images, image_tokenizer).to(image_tokenizer.device))
        save_image(render_stages(image_tokenizer, codes), out)
    else:
        save_image(render_reconstructions(image_tokenizer, images), out)
    print(out)


app.command()(evaluate)


def main() -> None:
    """Run the command line; print an error that the user can fix as one line, with exit code 2."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (UsageError, ValueError, OSError) as error:
        message = getattr(error, "format_message", error.__str__)()
        print(f"tok2img: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
