"""README.md of a trained folder, as the hub reads it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import TextToImagePipeline


def model_card(pipeline: "TextToImagePipeline") -> str:
    """README.md of a trained folder, as the hub reads it."""
    layout, sampling = pipeline.processor.layout, pipeline.default_sampling
    tokenizer = type(pipeline.processor.image_tokenizer).__name__
    return f"""---
library_name: tok2img
pipeline_tag: text-to-image
tags: [tok2img, text-to-image, {pipeline.prior.config.model_type}]
---
Draws pictures from captions: a {pipeline.prior.config.model_type} prior over {layout.num_codes} codes of a {tokenizer} with
{layout.codebook_size} options each.

```python
from tok2img import TextToImagePipeline

pipe = TextToImagePipeline.from_pretrained("path/to/this/folder")
pipe("a caption like those it was trained on", num_images_per_prompt=4, seed=0).images[0].save("picture.png")
```

Defaults: guidance_scale {sampling.guidance_scale}, temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p
{sampling.top_p:g}. The prior alone loads with `AutoModelForCausalLM.from_pretrained`.
"""
