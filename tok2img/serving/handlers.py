"""Handlers of the web page: image files and captions in, images and text out. They know nothing of gradio."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image

from tokenizers_vq.images.processing import images_from_pixels

from ..data.images import load_pixels
from ..generation.sampling import Guidance, random_seed
from ..pipelines.image_to_text import ImageToTextPipeline
from ..pipelines.text_to_image import TextToImagePipeline
from ..visualization.tokenizer_sheets import decode_images_by_stage

MAX_STAGES = 12
END_OF_RESULTS = object()
Images = list[Image.Image]


@dataclass
class Handlers:
    """Handlers of the web page, one per button.

    Each yields intermediate results and then the final one. A ValueError is shown to the user.

    Attributes:
        pipeline: The pipeline that is served.
    """

    pipeline: TextToImagePipeline

    def generate(
        self,
        caption: str,
        num_images: int = 4,
        guidance_scale: str = "",
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: str = "",
        best_of: int = 1,
        image: str | None = None,
        keep: int = 0,
    ) -> Iterator[tuple[Images, str]]:
        """Generate images for a caption, or complete an image.

        With coarse-to-fine codes each result is sharper than the one before.

        Args:
            caption: The caption.
            num_images: Number of images.
            guidance_scale: Guidance as typed: a number, or several with commas. "": the model's default.
            temperature: Softmax temperature. None: the model's default.
            top_k: Sample from the k most likely codes (0 = all). None: the model's default.
            top_p: Total probability of the codes to sample from. None: the model's default.
            seed: Seed as typed. "": a random one.
            best_of: Number of candidates for each image.
            image: File to complete or to vary.
            keep: Number of first codes of `image` to keep.

        Yields:
            The images so far, and the seed that generates them again.
        """
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "best_of": best_of}
        settings |= {"guidance_scale": parse_guidance(guidance_scale), "num_images_per_prompt": num_images}
        if keep or image is not None:
            settings |= {"image": self._preprocess(image), "keep": keep}
        elif not caption.strip():
            raise ValueError("the caption is empty: say what the images should show")
        settings |= {"seed": parse_seed(seed), "preview_after": self._preview_steps(keep, best_of)}
        for images in stream_results(partial(self._run_pipeline, caption, settings)):
            yield images, str(settings["seed"])

    def preprocessed_preview(self, image: str | None) -> Iterator[Image.Image]:
        """Show an image file as the model sees it.

        Args:
            image: The file.
        """
        yield self._preprocess(image)

    def codes(self, image: str | None) -> Iterator[tuple[list[tuple[Image.Image, str]], str]]:
        """Encode an image and decode growing prefixes of its codes.

        Args:
            image: The file.

        Yields:
            Labeled reconstructions, and the codes as text.
        """
        processor = self.pipeline.processor
        codes = processor.encode_images([require_file(image)])
        stages = decode_images_by_stage(processor.image_tokenizer, codes)
        selected = torch.linspace(0, len(stages) - 1, min(len(stages), MAX_STAGES)).round().int().tolist()
        labeled = [(stages[each][0], f"stage {each + 1} of {len(stages)}") for each in selected]
        yield labeled, " ".join(map(str, codes[0].tolist()))

    def caption(self, image: str | None) -> Iterator[str]:
        """Generate the greedy caption of an image.

        Args:
            image: The file.
        """
        yield ImageToTextPipeline(self.pipeline.prior, self.pipeline.processor)(require_file(image))[0]

    def _preprocess(self, image: str | None) -> Image.Image:
        """Load a file as the tokenizer reads it: upright, cropped to a square and resized."""
        return images_from_pixels(load_pixels([require_file(image)], self.pipeline.processor.image_tokenizer))[0]

    def _preview_steps(self, keep: int, best_of: int) -> range:
        """Return the numbers of codes after which to show a preview: all but the last, if prefixes decode."""
        tokenizer = self.pipeline.processor.image_tokenizer
        return range(keep + 1, tokenizer.num_codes) if tokenizer.supports_prefix_decoding and best_of == 1 else range(0)

    def _run_pipeline(self, caption: str, settings: dict[str, Any], show: Callable[[Images], None]) -> Images:
        """Run the pipeline; pass previews, if there are any, to `show`."""
        on_preview = (lambda images, *_: show(images)) if settings["preview_after"] else None
        images: Any = self.pipeline(caption, on_preview=on_preview, **settings).images
        return images


def parse_guidance(text: str) -> Guidance | None:
    """Parse a guidance scale as typed: a number, several for a schedule, or nothing.

    Raises:
        ValueError: If a part is not a number.
    """
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"guidance must be a number, or several with commas between, got {text!r}") from None
    return numbers if len(numbers) > 1 else next(iter(numbers), None)


def format_guidance(guidance: Guidance) -> str:
    """Format a guidance scale in the form that `parse_guidance` reads."""
    numbers = guidance if isinstance(guidance, Sequence) else [guidance]
    return ", ".join(f"{number:g}" for number in numbers)


def parse_seed(text: str) -> int:
    """Parse a seed as typed, or return a random one for blank text.

    Raises:
        ValueError: If the text is not an integer of at least 0.
    """
    if not text.strip():
        return random_seed()
    if not text.strip().isdecimal():
        raise ValueError(f"seed must be an integer of at least 0, got {text!r}")
    return int(text)


def require_file(image: str | None) -> str:
    """Return the path of an uploaded file.

    Raises:
        ValueError: If there is none.
    """
    if image is None:
        raise ValueError("no image: choose a file, or drop one into the field")
    return image


def stream_results(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """Run a function in a thread and yield its results as they come.

    Args:
        work: Called with a function that takes each intermediate result; returns the final one.

    Yields:
        The intermediate results and then the final one. An error of `work` is raised after those before it.
    """
    results: SimpleQueue[Any] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, results.put)
        # Also called if `work` fails, so that the loop below always ends.
        future.add_done_callback(lambda _: results.put(END_OF_RESULTS))
        yield from iter(results.get, END_OF_RESULTS)
        yield future.result()
