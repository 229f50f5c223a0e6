"""Priors of other projects with the width and depth of ours, for the benchmarks of training and generation.

Ours and DALLE-pytorch's have 9.0 million parameters; minDALL-E has 7.4 because it has no gates,
LlamaGen 7.0 because it has
no text ids. `--peer` names their checkouts. Packages that they import but no benchmark uses are
replaced by placeholders;
DALLE-pytorch really needs `axial_positional_embedding` and `rotary_embedding_torch`. Weights and inputs are random.
"""

import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tok2img.tokenization.layout import SequenceLayout

from .harness import import_peer

WIDTH, DEPTH, HEADS = 256, 6, 8
UNUSED_BY_DALLE = ("omegaconf", "pkg_resources", "taming.models.vqgan")
UNUSED_BY_MIN_DALLE = ("clip", "dalle.utils.config", "omegaconf", "pytorch_lightning")
T5_WIDTH = 2048

Draw = Callable[[], object]


def dalle_pytorch(layout: SequenceLayout) -> Any:
    """Build lucidrains/DALLE-pytorch with the defaults of its class, on image codes; None without its checkout."""
    peer: Any = import_peer("dalle_pytorch", unused=UNUSED_BY_DALLE)
    if peer is None:
        return None
    side = round(layout.num_codes**0.5)
    vae = peer.DiscreteVAE(image_size=8 * side, num_layers=3, num_tokens=layout.codebook_size)
    vae.decode = lambda codes: codes
    return peer.DALLE(
        dim=WIDTH,
        vae=vae,
        num_text_tokens=layout.text_vocab_size,
        text_seq_len=layout.text_length,
        depth=DEPTH,
        heads=HEADS,
        dim_head=WIDTH // HEADS,
    )


def dalle_loss(model: Any, text_ids: Tensor, codes: Tensor) -> Tensor:
    """Return its loss for text `b t` and codes `b n`."""
    return model(text_ids, codes, return_loss=True)


def dalle_draws(layout: SequenceLayout, text_ids: Tensor) -> dict[str, Draw]:
    """Generate codes for text `b t` as its `generate.py` does, and with its cache passed on, which it drops at guidance 1."""
    shipped, mended = dalle_pytorch(layout), dalle_pytorch(layout)
    if shipped is None:
        return {}
    mended.forward_with_cond_scale = lambda *inputs, cond_scale, **settings: mended(*inputs, **settings)
    draw = {"text": text_ids, "filter_thres": 0.9}
    return {
        "DALLE-pytorch as shipped": partial(shipped.generate_images, **draw),
        "DALLE-pytorch, cache mended": partial(mended.generate_images, **draw, use_cache=True),
    }


def min_dalle_draws(layout: SequenceLayout, text_ids: Tensor) -> dict[str, Draw]:
    """Build kakaobrain/minDALL-E as a function from text `b t` to codes."""
    peer: Any = import_peer("dalle.utils.sampling", unused=UNUSED_BY_MIN_DALLE)
    if peer is None:
        return {}
    transformer: Any = import_peer("dalle.models.stage2.transformer", unused=UNUSED_BY_MIN_DALLE)
    settings = Namespace(
        n_layers=DEPTH,
        n_dense_layers=DEPTH,
        embed_dim=WIDTH,
        n_heads=HEADS,
        ctx_len_img=layout.num_codes,
        ctx_len_txt=layout.text_length,
        mlp_bias=True,
        attn_bias=True,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        gelu_use_approx=False,
    )
    with warnings.catch_warnings(action="ignore"):
        model = transformer.Transformer1d(layout.pad_id + 1, layout.codebook_size, settings).eval()
    draw = partial(peer.sampling, is_tqdm=False, use_fp16=False, max_seq_len=layout.num_codes)
    return {"minDALL-E": partial(draw, model, text_ids)}


def llamagen_draws(layout: SequenceLayout, text_ids: Tensor) -> dict[str, Draw]:
    """Build FoundationVision/LlamaGen as a function to codes; its captions are T5 features, here random ones."""
    models: Any = import_peer("autoregressive.models.gpt")
    if models is None:
        return {}
    peer: Any = import_peer("autoregressive.models.generate")
    settings = models.ModelArgs(
        dim=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        vocab_size=layout.codebook_size,
        block_size=layout.num_codes,
        cls_token_num=layout.text_length,
        caption_dim=T5_WIDTH,
        model_type="t2i",
    )
    features = torch.randn(*text_ids.shape, T5_WIDTH, generator=torch.Generator().manual_seed(0))
    return {"LlamaGen": partial(peer.generate, models.Transformer(settings).eval(), features, layout.num_codes)}
