"""The page as a client sees it over HTTP. Server and client run in processes of their own."""

import json
import socket
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from tok2img.generation.captioning import CAPTION_KEY
from tok2img.pipelines.image_to_text import ImageToTextPipeline
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.model import build_prior
from tok2img.tokenization.processor import Tok2ImgProcessor
from tokenizers_vq import VQVAE, VQVAEConfig

if find_spec("gradio") is None:
    pytest.skip("the page needs gradio", allow_module_level=True)

# Reads lines of [endpoint, inputs]; writes the result or the error of each.
ASK = """
import json, sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
for name, inputs in map(json.loads, sys.stdin):
    files = {key: handle_file(value) for key, value in inputs.items() if key == "image"}
    try:
        print(json.dumps(client.predict(**inputs | files, api_name=name)))
    except Exception as error:
        print(json.dumps({"complaint": str(error)}))
"""

# Writes the public endpoints of a page, first for a model that captions, then for one that does not.
TABS = f"""
import json, sys
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.serving.web_page import build_page
pipeline = TextToImagePipeline.from_pretrained(sys.argv[1])
for captions in (True, False):
    pipeline.prior.generation_config.{CAPTION_KEY} = captions
    asked = build_page(pipeline, name="a model").fns.values()
    print(json.dumps(sorted(each.api_name for each in asked if each.api_visibility == "public")))
"""


def command(folder, port: int) -> list[str]:
    return [sys.executable, "-m", "tok2img", "serve", "--model", str(folder), "--port", str(port)]


@pytest.fixture(scope="module")
def folder(text_tokenizer, tmp_path_factory):
    """A model that generates images and captions."""
    tokenizer = VQVAE(VQVAEConfig(image_size=8, hidden_channels=16, codebook_size=16)).eval()
    processor = Tok2ImgProcessor.build(tokenizer, text_tokenizer, text_length=6)
    prior = build_prior(processor.layout, depth=1)
    setattr(prior.generation_config, CAPTION_KEY, True)
    folder = tmp_path_factory.mktemp("served") / "model"
    TextToImagePipeline(prior, processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Address of the served page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(command(folder, port), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.terminate()


@pytest.fixture
def ask(address):
    """Function that sends requests to the page."""

    def ask(*questions):
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        done = subprocess.run([sys.executable, "-c", ASK, address], input=lines, capture_output=True, text=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return ask


def shown(gallery) -> list[list]:
    return [np.asarray(Image.open(each["image"]).convert("RGB")).tolist() for each in gallery]


def values(images) -> list[list]:
    return [np.asarray(image.convert("RGB")).tolist() for image in images]


def test_endpoints_return_the_results_of_the_pipelines(ask, folder, pil_images, tmp_path):
    pil_images[0].save(tmp_path / "in.png")
    given = {"image": str(tmp_path / "in.png")}
    generated, completed, coded, captioned = ask(
        ["/generate", {"caption": "a red disc", "num_images": 3, "seed": "7"}],
        ["/complete", given | {"keep": 2, "caption": "a dog", "num_images": 2, "seed": "1"}],
        ["/codes", given],
        ["/caption", given],
    )
    pipeline = TextToImagePipeline.from_pretrained(folder)
    assert shown(generated[0]) == values(pipeline("a red disc", 3, seed=7).images) and generated[1] == "7"
    assert shown(completed[0]) == values(pipeline("a dog", 2, seed=1, image=pil_images[0], keep=2).images)
    assert coded[1] == " ".join(map(str, pipeline.processor.encode_images([pil_images[0]])[0].tolist()))
    assert captioned == ImageToTextPipeline.from_pretrained(folder)([pil_images[0]])[0]


def test_generate_with_invalid_input_returns_the_error(ask):
    empty, seed, many = ask(
        ["/generate", {"caption": " "}],
        ["/generate", {"caption": "a dog", "seed": "x"}],
        ["/generate", {"caption": "a dog", "num_images": 10**6}],
    )
    assert empty == {"complaint": "the caption is empty: say what the images should show"}
    assert seed == {"complaint": "seed must be an integer of at least 0, got 'x'"}
    assert "1000000" in many["complaint"]


def test_the_page_loads_no_fonts_from_other_servers(address):
    with urllib.request.urlopen(address + "theme.css") as answer:
        style = answer.read()
    assert b"system-ui" in style and b"@import" not in style and b"url(http" not in style.replace(b"'", b"")


def test_serve_with_a_taken_port_fails_with_one_line(address, folder):
    port = int(address.rstrip("/").rpartition(":")[2])
    taken = subprocess.run(command(folder, port), capture_output=True, text=True)
    assert taken.returncode == 2 and len(taken.stderr.splitlines()) == 1
    assert taken.stderr.startswith("tok2img: ") and str(port) in taken.stderr


def test_build_page_has_a_caption_tab_only_for_a_model_that_captions(folder):
    done = subprocess.run([sys.executable, "-c", TABS, str(folder)], capture_output=True, text=True, check=True)
    captions, does_not = map(json.loads, done.stdout.splitlines())
    assert captions == ["caption", "codes", "complete", "generate"] and does_not == ["codes", "complete", "generate"]
