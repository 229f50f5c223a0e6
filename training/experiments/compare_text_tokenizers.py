"""Compare text VQ-DRAW with a residual 1-D VQ-VAE at equal bits and equal training time.

    python training/experiments/compare_text_tokenizers.py DATA SECONDS

Both encode spans of up to 8 bytes as 4 codes of 64 options, about one bit per byte each, and train
for SECONDS of CPU time.
Prints the fraction of correct held-out bytes after each code.
"""

import json
import sys
from typing import Any

import torch
from cpu_time_budget import train_for

from tok2img.data.loading import load_captioned_images
from tok2img.evaluation.reports import load_eval_split
from tok2img.evaluation.text_metrics import evaluate_text_tokenizer
from tok2img.recipes.build_tokenizer import build_text_model
from tok2img.recipes.config import TokenizerRecipe

SHARED: dict[str, Any] = {"span_length": 8, "span_unit": "words", "codebook_size": 64, "dilations": [1, 2, 4, 8, 16]}
MODELS: dict[str, dict[str, Any]] = {
    "vqdraw": {"num_stages": 4, "hidden_channels": 96, "aux_coeff": 0.001},
    "vqvae": {"num_quantizers": 4, "hidden_channels": 192},
}
BATCH_SIZE = 16
LEARNING_RATES = {"vqdraw": 4e-3, "vqvae": 2e-3}
ROWS_TO_START_FROM = 4000


def main(data: str, seconds: float, *, max_texts: int = 1000) -> dict[str, Any]:
    """Train both, and print their accuracy after each code as JSON."""
    torch.manual_seed(0)
    rows = load_captioned_images(data, with_images=False)
    texts = load_eval_split(data, with_images=False, max_samples=max_texts)["caption"][:]
    curves: dict[str, Any] = {}
    for name, settings in MODELS.items():
        model = build_text_model(TokenizerRecipe(tokenizer=f"{name}_text", model=SHARED | settings), rows)
        symbols = model.texts_to_symbols(rows["caption"][:])
        steps = train_for(
            model,
            symbols[torch.randperm(len(symbols))],
            seconds=seconds,
            learning_rate=LEARNING_RATES[name],
            batch_size=BATCH_SIZE,
            num_init_examples=ROWS_TO_START_FROM,
        )
        report = evaluate_text_tokenizer(model.eval(), texts)
        curves |= {"bits_per_byte": report["bits_per_byte"], name: report["byte_accuracy"], f"{name}_steps": steps}
    print(json.dumps(curves, indent=2))
    return curves


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
