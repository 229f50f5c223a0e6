"""The page as programs see it that ask it over HTTP: it is served, and asked, by processes of their own."""

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

# Reads [name, inputs] a line, writes what the page answers, or what it complains of.
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

# Writes what programs can ask of a page, first where the model captions, then where it does not.
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
    """A model that draws and captions."""
    tokenizer = VQVAE(VQVAEConfig(image_size=8, hidden_channels=16, codebook_size=16)).eval()
    processor = Tok2ImgProcessor.build(tokenizer, text_tokenizer, text_length=6)
    prior = build_prior(processor.layout, depth=1)
    setattr(prior.generation_config, CAPTION_KEY, True)
    folder = tmp_path_factory.mktemp("served") / "model"
    TextToImagePipeline(prior, processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Where the model is served."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(command(folder, port), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.terminate()


@pytest.fixture
def ask(address):
    """What the page answers to each of the questions."""

    def ask(*questions):
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        done = subprocess.run([sys.executable, "-c", ASK, address], input=lines, capture_output=True, text=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return ask


def shown(gallery) -> list[list]:
    return [np.asarray(Image.open(each["image"]).convert("RGB")).tolist() for each in gallery]


def values(images) -> list[list]:
    return [np.asarray(image.convert("RGB")).tolist() for image in images]


def test_programs_get_what_the_pipelines_make(ask, folder, pil_images, tmp_path):
    pil_images[0].save(tmp_path / "in.png")
    given = {"image": str(tmp_path / "in.png")}
    drawn, completed, coded, captioned = ask(
        ["/draw", {"caption": "a red disc", "num_images": 3, "seed": "7"}],
        ["/complete", given | {"keep": 2, "caption": "a dog", "num_images": 2, "seed": "1"}],
        ["/codes", given],
        ["/caption", given],
    )
    pipeline = TextToImagePipeline.from_pretrained(folder)
    assert shown(drawn[0]) == values(pipeline("a red disc", 3, seed=7).images) and drawn[1] == "7"
    assert shown(completed[0]) == values(pipeline("a dog", 2, seed=1, image=pil_images[0], keep=2).images)
    assert coded[1] == " ".join(map(str, pipeline.processor.encode_images([pil_images[0]])[0].tolist()))
    assert captioned == ImageToTextPipeline.from_pretrained(folder)([pil_images[0]])[0]


def test_what_is_wrong_is_said(ask):
    empty, seed, many = ask(
        ["/draw", {"caption": " "}],
        ["/draw", {"caption": "a dog", "seed": "x"}],
        ["/draw", {"caption": "a dog", "num_images": 10**6}],
    )
    assert empty == {"complaint": "the caption is empty: say what the images are to show"}
    assert seed == {"complaint": "a seed must be a whole number of at least 0, got 'x'"}
    assert "1000000" in many["complaint"]


def test_the_page_asks_no_one_else_for_fonts(address):
    with urllib.request.urlopen(address + "theme.css") as answer:
        style = answer.read()
    assert b"system-ui" in style and b"@import" not in style and b"url(http" not in style.replace(b"'", b"")


def test_a_port_that_is_taken_is_an_error_of_one_line(address, folder):
    port = int(address.rstrip("/").rpartition(":")[2])
    taken = subprocess.run(command(folder, port), capture_output=True, text=True)
    assert taken.returncode == 2 and len(taken.stderr.splitlines()) == 1
    assert taken.stderr.startswith("tok2img: ") and str(port) in taken.stderr


def test_only_a_model_that_captions_has_a_tab_for_it(folder):
    done = subprocess.run([sys.executable, "-c", TABS, str(folder)], capture_output=True, text=True, check=True)
    captions, does_not = map(json.loads, done.stdout.splitlines())
    assert captions == ["caption", "codes", "complete", "draw"] and does_not == ["codes", "complete", "draw"]
