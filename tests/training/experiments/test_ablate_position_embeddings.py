import re

from tok2img.data.shapes import shapes_dataset
from tok2img.tokenization.processor import Tok2ImgProcessor
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tok2img.tokenization.token_dataset import save_tokens
from tokenizers_vq import VQVAE, VQVAEConfig


def test_all_priors_train_on_the_same_batches(script, tmp_path, monkeypatch, capsys):
    rows = shapes_dataset("train", 30)
    model = VQVAE(VQVAEConfig(image_size=8, hidden_channels=8, codebook_size=6, code_dim=4))
    processor = Tok2ImgProcessor.build(
        model, SubwordTokenizer.train_bpe(rows["caption"][:], vocab_size=256), text_length=4
    )
    axial_position_embeddings = script("experiments/ablate_position_embeddings")
    monkeypatch.setattr(axial_position_embeddings, "NUM_HELD_OUT", 8)
    monkeypatch.setattr(axial_position_embeddings, "DEPTH", 1)
    save_tokens(rows, processor, tmp_path / "tokens")
    axial_position_embeddings.main(str(tmp_path / "tokens"), 4, [3])
    lines = re.findall(r"seed 3  (.+?) +(\d\.\d{4})  (\d\.\d{4})", capsys.readouterr().out)
    assert [line[0] for line in lines] == list(axial_position_embeddings.KINDS) and len(
        {line[1:] for line in lines}
    ) == 4
