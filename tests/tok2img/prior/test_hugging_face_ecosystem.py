"""A trained folder in the hands of others: stock transformers, peft, the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

from tok2img.generation.generate import generate
from tok2img.generation.sampling import Sampling
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.pipelines.transformers_task import TextToImageTask, register_task
from tok2img.prior.loss import PriorWithLoss
from tokenizers_vq import load_image

PROMPTS = ["a red square", "a dog", ""]
# Ids of each position from layout.json alone, as in docs/serving.md.
STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
layout = json.load(open(sys.argv[1] + "/layout.json"))
first = layout["text_vocab_size"] + 3
num_codes, size = layout["num_codes"], layout["codebook_size"]
offsets = [first + (0 if layout["codes_shared"] else size * position) for position in range(num_codes)]
prompts = torch.tensor(json.loads(sys.argv[2]))
ids = AutoModelForCausalLM.from_pretrained(sys.argv[1]).generate(
    prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=num_codes,
    prefix_allowed_tokens_fn=lambda row, ids: range(offset := offsets[len(ids) - prompts.shape[1]], offset + size),
)
print(json.dumps([[i - o for i, o in zip(row, offsets)] for row in ids[:, prompts.shape[1]:].tolist()]))
assert not {"tok2img", "tokenizers_vq"} & sys.modules.keys()
"""
TASK = """
import sys
import tok2img
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import pipeline
import tok2img.pipelines
(image,) = pipeline("text-to-image", model=sys.argv[1])("a dog", seed=0)
print(image.size)
"""


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    pipeline.default_sampling = Sampling(guidance_scale=2.0, temperature=0.9)
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(script: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        cwd=Path(__file__).parents[3],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_transformers_generates_our_greedy_codes_without_our_code(pipeline, folder):
    text_ids = pipeline.processor.encode_text(PROMPTS)
    prompts = pipeline.processor.layout.prompt(text_ids)
    codes = generate(pipeline.prior, pipeline.processor.layout, text_ids, sampling=Sampling(temperature=0))
    assert json.loads(run(STOCK, folder, prompts.tolist())) == codes.tolist()


def test_transformers_pipeline_returns_the_images_of_our_pipeline(pipeline, folder):
    task = transformers.pipeline("text-to-image", model=str(folder), device=-1)
    expected = pipeline(PROMPTS, 2, seed=3).images
    assert [each.tobytes() for each in task(PROMPTS, num_images_per_prompt=2, seed=3)] == [
        each.tobytes() for each in expected
    ]
    (image,) = task("a dog", seed=0, guidance_scale=1.0, temperature=0.5)
    assert image.tobytes() == pipeline("a dog", seed=0, guidance_scale=1.0, temperature=0.5).images[0].tobytes()


def test_importing_the_pipelines_registers_the_task_and_importing_tok2img_loads_no_torch(folder):
    assert run(TASK, folder).strip() == "(8, 8)"


def test_registering_adds_the_task_to_a_registry_without_it(monkeypatch):
    monkeypatch.delitem(PIPELINE_REGISTRY.supported_tasks, "text-to-image")
    register_task()
    assert PIPELINE_REGISTRY.check_task("text-to-image")[1]["impl"] is TextToImageTask


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of transformers, about peft
def test_peft_wraps_the_prior_and_trains_a_little_of_it(pipeline):
    peft = pytest.importorskip("peft")
    layout = pipeline.processor.layout
    text_ids, codes = pipeline.processor.encode_text(PROMPTS), torch.randint(layout.codebook_size, (3, 4))
    before = generate(pipeline.prior, layout, text_ids, seed=1)
    wrapped = peft.get_peft_model(pipeline.prior, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert generate(wrapped.get_base_model(), layout, text_ids, seed=1).equal(before)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    model = PriorWithLoss(wrapped.get_base_model(), layout, caption_dropout=0.0)
    losses = []
    for _ in range(10):
        losses.append(model(text_ids, codes).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and all("lora" in n for n, p in wrapped.named_parameters() if p.requires_grad)


@pytest.fixture
def hub(monkeypatch) -> dict[str, dict[str, bytes]]:
    """A hub of our own: repositories and their files."""
    repositories: dict[str, dict[str, bytes]] = {}

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            repositories[repo_id] = {}
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
            repositories[repo_id] = {str(path.relative_to(folder_path)): path.read_bytes() for path in files}

    monkeypatch.setattr("tok2img.pipelines.text_to_image.HfApi", Api)
    return repositories


def test_the_whole_folder_goes_to_the_hub_and_comes_back(pipeline, hub, tmp_path, monkeypatch):
    assert pipeline.push_to_hub("me/dogs", sample_prompts=["a dog"]) == "https://huggingface.co/me/dogs"
    files = hub["me/dogs"]
    assert {"model.safetensors", "layout.json", "README.md", "samples.png", "generation_config.json"} <= files.keys()
    assert b"from_pretrained('me/dogs')" in files["README.md"]

    def download(name: str, **_) -> str:
        for path, content in hub[name].items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        return str(tmp_path)

    monkeypatch.setattr("tokenizers_vq.loading.snapshot_download", download)
    again = TextToImagePipeline.from_pretrained("me/dogs")
    assert again("a dog", 4, seed=0).codes.equal(pipeline("a dog", 4, seed=0).codes)


def test_the_task_loads_its_processor_from_the_hub(pipeline, folder, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.name_or_path = "me/dogs"
    monkeypatch.setattr("tokenizers_vq.loading.snapshot_download", lambda name, **_: {"me/dogs": str(folder)}[name])
    (image,) = TextToImageTask(model, device=-1)("a dog", seed=0)
    assert image.tobytes() == pipeline("a dog", seed=0).images[0].tobytes()


def test_a_name_that_the_hub_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="me/nothing is not a tok2img model folder, nor a repository on the hub"):
        TextToImagePipeline.from_pretrained("me/nothing")


def test_a_model_card_shows_a_sample_and_code_that_runs(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model", sample_prompts=["a dog", "a red disc"])
    card = (tmp_path / "model" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert "library_name: tok2img\n" in header and "pipeline_tag: text-to-image\n" in header
    assert "(samples.png)" in body and load_image(tmp_path / "model" / "samples.png").width > 96
    monkeypatch.chdir(tmp_path)
    exec(body.split("```python\n")[1].split("```")[0], {})
    assert load_image("image.png").size == (8, 8)
