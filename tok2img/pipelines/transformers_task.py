"""`transformers.pipeline("text-to-image", model=folder)`: our pipeline under the name that transformers looks for."""

from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.generic import ModelOutput

TASK = "text-to-image"


class TextToImageTask(Pipeline):
    """Calls `TextToImagePipeline` with the model that transformers has loaded; what it is called with goes there as it is."""

    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_processor = False

    def __init__(self, model: Any, **settings: Any):
        from ..tokenization.processor import Tok2ImgProcessor
        from .text_to_image import TextToImagePipeline

        super().__init__(model, **settings)
        processor = Tok2ImgProcessor.from_pretrained(model.name_or_path)
        self.drawing = TextToImagePipeline(model, processor).to(self.device)

    def __call__(self, prompt: str | list[str], **settings: Any) -> Any:
        """Images of one prompt, or of several in one run, as a list; settings as in `TextToImagePipeline`."""
        _, settings, _ = self._sanitize_parameters(**settings)
        return self.postprocess(self._forward(self.preprocess(prompt), **settings))

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, settings, {}

    def preprocess(self, input_: Any, **settings: Any) -> dict[str, Any]:
        """The prompt as it is."""
        return {"prompt": input_}

    def _forward(self, input_tensors: dict[str, Any], **settings: Any) -> ModelOutput:
        return ModelOutput(images=self.drawing(**input_tensors, **settings).images)

    def postprocess(self, model_outputs: ModelOutput, **settings: Any) -> Any:
        """The images alone."""
        return model_outputs["images"]


def register() -> None:
    """Tell transformers of the task."""
    PIPELINE_REGISTRY.register_pipeline(TASK, TextToImageTask, pt_model=AutoModelForCausalLM, type="text")
