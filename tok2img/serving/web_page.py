"""The web page of a trained model: `tok2img serve`. Needs gradio, the extra `demo`.

A tab is a form around one of the `Handlers`, which also answer programs, by the same names (`gradio_client`).
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr
from gradio.themes import Default

from ..generation.captioning import can_caption
from ..pipelines.text_to_image import TextToImagePipeline
from .handlers import Handlers, as_text

MOST_IMAGES = 16
MOST_CANDIDATES = 8
# Images of a few pixels are shown in squares, not in a blur; fonts are those of the reader's own machine.
STYLE = """
.pixels img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.pixels .grid-wrap {height: auto !important; min-height: 6rem !important; max-height: none !important}
.pixels .grid-container {padding-top: 1.5rem}
footer {display: none !important}
"""
THEME = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(pipeline: TextToImagePipeline, *, name: str) -> gr.Blocks:
    """The page of a model: a tab to draw, one to complete images, one to see their codes, one to caption where the model can."""
    tabs = {"Draw": draw_tab, "Complete": complete_tab, "Codes": codes_tab, "Caption": caption_tab}
    if not can_caption(pipeline.prior):
        del tabs["Caption"]
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(f"# {name}\n{facts(pipeline)}")
        for label, tab in tabs.items():
            with gr.Tab(label):
                tab(Handlers(pipeline))
    return page


def serve_page(page: gr.Blocks, *, host: str, port: int, share: bool = False) -> str:
    """Serve a page from threads of its own; returns its address. OSError where the port is taken."""
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


def facts(pipeline: TextToImagePipeline) -> str:
    """A line on what the model draws, and of what."""
    tokenizer: Any = pipeline.processor.image_tokenizer
    size, weights = tokenizer.config.image_size, sum(each.numel() for each in pipeline.prior.parameters())
    codes = f"{tokenizer.num_codes} codes of {tokenizer.codebook_size} options"
    return (
        f"{size} x {size} pixels, {codes}, a {pipeline.prior.config.model_type} of {weights / 1e6:.1f} million weights"
    )


def draw_tab(answers: Handlers) -> None:
    """Captions to images."""
    caption = gr.Textbox("", label="Caption", placeholder="What the images are to show", autofocus=True)
    inputs, button = [caption, *drawing_fields(answers)], gr.Button("Draw", variant="primary")
    gr.on([button.click, caption.submit], told(answers.draw), inputs, drawn_fields(), api_name="draw")


def complete_tab(answers: Handlers) -> None:
    """An image's first codes, and new ones after them."""
    num_codes = answers.pipeline.processor.image_tokenizer.num_codes
    image = image_field(answers)
    keep = gr.Slider(0, num_codes, num_codes // 2, step=1, precision=0, label="First codes that stay")
    caption = gr.Textbox("", label="Caption", placeholder="What the whole is to show")
    inputs, button = [caption, *drawing_fields(answers), image, keep], gr.Button("Complete", variant="primary")
    gr.on([button.click, caption.submit], told(answers.draw), inputs, drawn_fields(), api_name="complete")


def codes_tab(answers: Handlers) -> None:
    """What an image becomes: its codes, and what they show."""
    image, button = image_field(answers), gr.Button("Show", variant="primary")
    outputs = [gallery("What its codes show"), gr.Textbox(label="Codes", lines=3, buttons=["copy"])]
    button.click(told(answers.codes), [image], outputs, api_name="codes")


def caption_tab(answers: Handlers) -> None:
    """Images to captions."""
    image, button = image_field(answers), gr.Button("Caption", variant="primary")
    button.click(told(answers.caption), [image], [gr.Textbox(label="Caption")], api_name="caption")


def drawing_fields(answers: Handlers) -> list[Any]:
    """How many images, and how to draw them."""
    own = answers.pipeline.default_sampling
    num_images = gr.Slider(1, MOST_IMAGES, 4, step=1, precision=0, label="Images")
    with gr.Accordion("How to draw them", open=False):
        with gr.Row():
            guidance = gr.Textbox(
                as_text(own.guidance_scale), label="Guidance", info="How strongly to follow the caption; 1, 4 rises"
            )
            temperature = gr.Number(own.temperature, label="Temperature", info="0 takes the likeliest code")
            top_k = gr.Number(own.top_k, label="Top k", info="Among so many of the likeliest; 0: all", precision=0)
            top_p = gr.Number(own.top_p, label="Top p", info="Among the likeliest with this probability")
            seed = gr.Textbox("", label="Seed", info="The same one draws the same images", placeholder="a new one")
        best_of = gr.Slider(
            1, MOST_CANDIDATES, 1, step=1, precision=0, label="Candidates for each image; the likeliest stays"
        )
    return [num_images, guidance, temperature, top_k, top_p, seed, best_of]


def drawn_fields() -> list[Any]:
    """Images, and the seed that draws them again."""
    return [gallery("Images"), gr.Textbox(label="Seed of these images", interactive=False, buttons=["copy"])]


def gallery(label: str) -> gr.Gallery:
    """Images as they are, to the last bit."""
    return gr.Gallery(
        label=label,
        columns=4,
        format="png",
        object_fit="contain",
        height="auto",
        elem_classes="pixels",
        interactive=False,
    )


def image_field(answers: Handlers) -> gr.Image:
    """A field for a file, which will be read as any other is; beside it stands what the model sees of it."""
    with gr.Row():
        image = gr.Image(label="Image", type="filepath", image_mode=None, height=240)
        seen = gr.Image(
            label="What the model sees of it", format="png", height=240, elem_classes="pixels", interactive=False
        )
    image.upload(told(answers.seen), [image], [seen], api_visibility="private")
    image.clear(lambda: None, None, [seen], api_visibility="private")
    return image


def told(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same, but errors that whoever reads the page can mend stand there in one line."""

    @wraps(work)
    def run(*inputs: Any) -> Iterator[Any]:
        try:
            yield from work(*inputs)
        except (ValueError, OSError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

    return run
