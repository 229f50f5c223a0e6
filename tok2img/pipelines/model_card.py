"""The model card (README.md) of a trained folder, in the form that the hub reads."""

from ..generation.sampling import Sampling
from ..tokenization.layout import SequenceLayout

SAMPLES_FILE = "samples.png"


def model_card(
    layout: SequenceLayout,
    sampling: Sampling,
    *,
    model_type: str,
    image_tokenizer: str,
    name: str,
    prompts: list[str] | None = None,
) -> str:
    """Write a model card: what the model is, runnable code and the sampling defaults.

    Args:
        layout: The layout of the prior's sequences.
        sampling: The model's default sampling settings.
        model_type: Model type of the prior in transformers, such as "qwen3".
        image_tokenizer: Class name of the image tokenizer.
        name: The folder or hub name that the code passes to `from_pretrained`.
        prompts: Captions of the images in `samples.png`; None if there is no such file.

    Returns:
        Markdown with a YAML header.
    """
    prompt = prompts[0] if prompts else "a caption like those it was trained on"
    images = f"\n![Generated images, each above its caption]({SAMPLES_FILE})\n" if prompts else ""
    return f"""---
library_name: tok2img
pipeline_tag: text-to-image
tags: [tok2img, text-to-image, {model_type}]
---
Generates images from captions: a {model_type} prior over {layout.num_codes} codes of a {image_tokenizer} with
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
