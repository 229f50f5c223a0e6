"""Web page of a trained model: `tok2img serve`. Needs gradio, the extra `demo`.

Each tab is a form for one of the `Handlers`. Programs call the same handlers through `gradio_client`.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr
from gradio.themes import Default

from ..generation.captioning import can_caption
from ..pipelines.text_to_image import TextToImagePipeline
from .handlers import Handlers, format_guidance

MAX_IMAGES = 16
MAX_CANDIDATES = 8
# Without `pixelated` a browser would blur images of a few pixels.
STYLE = """
.pixels img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.pixels .grid-wrap {height: auto !important; min-height: 6rem !important; max-height: none !important}
.pixels .grid-container {padding-top: 1.5rem}
footer {display: none !important}
"""
# Fonts of the reader's own machine: the default theme fetches its fonts from Google.
THEME = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(pipeline: TextToImagePipeline, *, name: str) -> gr.Blocks:
    """Build the page of a model: tabs to generate and complete images, to show codes and to caption.

    Args:
        pipeline: The pipeline to serve. The caption tab is left out if its prior cannot caption.
        name: Title of the page.
    """
    tabs = {"Generate": generate_tab, "Complete": complete_tab, "Codes": codes_tab, "Caption": caption_tab}
    if not can_caption(pipeline.prior):
        del tabs["Caption"]
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(f"# {name}\n{model_summary(pipeline)}")
        for label, tab in tabs.items():
            with gr.Tab(label):
                tab(Handlers(pipeline))
    return page


def serve_page(page: gr.Blocks, *, host: str, port: int, share: bool = False) -> str:
    """Serve a page from background threads.

    Args:
        page: The page.
        host: Address to listen on.
        port: Port to listen on.
        share: Whether gradio also creates a public link.

    Returns:
        The address of the page.

    Raises:
        OSError: If the port is taken.
    """
    _, address, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=THEME,
        css=STYLE,
        quiet=True,
        prevent_thread_lock=True,
    )
    return public or address


def model_summary(pipeline: TextToImagePipeline) -> str:
    """Describe image size, codes and prior in one line."""
    tokenizer: Any = pipeline.processor.image_tokenizer
    size, num_weights = tokenizer.config.image_size, sum(each.numel() for each in pipeline.prior.parameters())
    codes = f"{tokenizer.num_codes} codes of {tokenizer.codebook_size} options"
    model_type = pipeline.prior.config.model_type
    return f"{size} x {size} pixels, {codes}, a {model_type} with {num_weights / 1e6:.1f} million parameters"


def generate_tab(handlers: Handlers) -> None:
    """Add a form that generates images for a caption."""
    caption = gr.Textbox("", label="Caption", placeholder="What the images should show", autofocus=True)
    inputs, button = [caption, *sampling_fields(handlers)], gr.Button("Generate", variant="primary")
    run = with_gradio_errors(handlers.generate)
    gr.on([button.click, caption.submit], run, inputs, output_fields(), api_name="generate")


def complete_tab(handlers: Handlers) -> None:
    """Add a form that keeps an image's first codes and generates the rest."""
    num_codes = handlers.pipeline.processor.image_tokenizer.num_codes
    image = image_field(handlers)
    keep = gr.Slider(0, num_codes, num_codes // 2, step=1, precision=0, label="Number of first codes to keep")
    caption = gr.Textbox("", label="Caption", placeholder="What the completed image should show")
    inputs, button = [caption, *sampling_fields(handlers), image, keep], gr.Button("Complete", variant="primary")
    run = with_gradio_errors(handlers.generate)
    gr.on([button.click, caption.submit], run, inputs, output_fields(), api_name="complete")


def codes_tab(handlers: Handlers) -> None:
    """Add a form that shows an image's codes and what they decode to."""
    image, button = image_field(handlers), gr.Button("Encode", variant="primary")
    outputs = [gallery("Reconstructions"), gr.Textbox(label="Codes", lines=3, buttons=["copy"])]
    button.click(with_gradio_errors(handlers.codes), [image], outputs, api_name="codes")


def caption_tab(handlers: Handlers) -> None:
    """Add a form that captions an image."""
    image, button = image_field(handlers), gr.Button("Caption", variant="primary")
    button.click(with_gradio_errors(handlers.caption), [image], [gr.Textbox(label="Caption")], api_name="caption")


def sampling_fields(handlers: Handlers) -> list[Any]:
    """Create the fields for the number of images and the sampling settings, in the order of `Handlers.generate`."""
    default = handlers.pipeline.default_sampling
    num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, precision=0, label="Number of images")
    with gr.Accordion("Sampling settings", open=False):
        with gr.Row():
            guidance = gr.Textbox(
                format_guidance(default.guidance_scale),
                label="Guidance scale",
                info="How strongly to follow the caption; 1, 4 rises from 1 to 4",
            )
            temperature = gr.Number(default.temperature, label="Temperature", info="0 = always the most likely code")
            top_k = gr.Number(default.top_k, label="Top-k", info="Sample from the k most likely (0 = all)", precision=0)
            top_p = gr.Number(default.top_p, label="Top-p", info="Sample from the most likely with this probability")
            seed = gr.Textbox("", label="Seed", info="The same seed gives the same images", placeholder="random")
        best_of = gr.Slider(
            1, MAX_CANDIDATES, 1, step=1, precision=0, label="Candidates per image; the most likely is kept"
        )
    return [num_images, guidance, temperature, top_k, top_p, seed, best_of]


def output_fields() -> list[Any]:
    """Create the fields for the images and the seed that generates them again."""
    return [gallery("Images"), gr.Textbox(label="Seed of these images", interactive=False, buttons=["copy"])]


def gallery(label: str) -> gr.Gallery:
    """Create a gallery of images; PNG, because gradio's default would compress them with loss."""
    return gr.Gallery(
        label=label,
        columns=4,
        format="png",
        object_fit="contain",
        height="auto",
        elem_classes="pixels",
        interactive=False,
    )


def image_field(handlers: Handlers) -> gr.Image:
    """Create an upload field and, next to it, the image as the model sees it."""
    with gr.Row():
        # A path and no image mode: gradio would decode the file in its own way.
        image = gr.Image(label="Image", type="filepath", image_mode=None, height=240)
        preview = gr.Image(
            label="As the model sees it", format="png", height=240, elem_classes="pixels", interactive=False
        )
    image.upload(with_gradio_errors(handlers.preprocessed_preview), [image], [preview], api_visibility="private")
    image.clear(lambda: None, None, [preview], api_visibility="private")
    return image


def with_gradio_errors(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Wrap a handler so that ValueError and OSError are shown as one-line gradio errors."""

    @wraps(handler)
    def run(*inputs: Any) -> Iterator[Any]:
        try:
            yield from handler(*inputs)
        except (ValueError, OSError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

    return run
