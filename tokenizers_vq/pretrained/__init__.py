"""Image tokenizers of transformers and diffusers behind our interface."""
