"""README.md of a trained folder, as the hub reads it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline

SAMPLES_FILE = "samples.png"


def model_card(
    pipeline: "TextToImagePipeline", *, name: str = "path/to/this/folder", prompts: list[str] | None = None
) -> str:
    """What the model is, code that runs, and its defaults.

    Args:
        name: what `from_pretrained` finds the folder by.
        prompts: captions of the images in `samples.png`, where there is one.
    """
    layout, sampling = pipeline.processor.layout, pipeline.default_sampling
    tokenizer = type(pipeline.processor.image_tokenizer).__name__
    prompt = prompts[0] if prompts else "a caption like those it was trained on"
    images = f"\n![Images that it drew, above the captions it was given]({SAMPLES_FILE})\n" if prompts else ""
    return f"""---
library_name: tok2img
pipeline_tag: text-to-image
tags: [tok2img, text-to-image, {pipeline.prior.config.model_type}]
---
Draws images from captions: a {pipeline.prior.config.model_type} prior over {layout.num_codes} codes of a {tokenizer} with
{layout.codebook_size} options each.
{images}
```python
from tok2img import TextToImagePipeline

pipe = TextToImagePipeline.from_pretrained({name!r})
pipe({prompt!r}, num_images_per_prompt=4, seed=0).images[0].save("image.png")
```

Defaults: guidance_scale {sampling.guidance_scale}, temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p
{sampling.top_p:g}. The prior alone loads with `AutoModelForCausalLM.from_pretrained`.
"""
