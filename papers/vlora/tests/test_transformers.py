"""VLoRA at home in transformers: where this repository is not, in transformers' own tests, on its newest version."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from common.data.tiny.scenes import word_tokenizer
from common.tests.transformers_suite import environment, other_version, run_suite
from papers.vlora import VLoRAProcessor
from papers.vlora.processing import TEMPLATES
from papers.vlora.tests.models import TEXT, vlora

SUITE = Path(__file__).parent / "suite.py"
NEWEST = "5.24.0"

ELSEWHERE = """
import importlib.util, json, sys
import torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
assert not importlib.util.find_spec("papers") and not importlib.util.find_spec("common"), sys.path
folder, picture = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "VLoRAConfig"
talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}]
inputs = processor(Image.open(picture), processor.apply_chat_template(talk, add_generation_prompt=True))
out = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
plain = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False)
print(json.dumps([transformers.__version__, out.tolist(), plain.tolist()]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a saved model and processor, a picture, what it answers here)"""
    folder = tmp_path_factory.mktemp("saved")
    model = vlora()
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = VLoRAProcessor(images, word_tokenizer(), chat_template=TEMPLATES["short"])
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture = folder / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((40, 30)).save(picture)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}]
    assert len(processor.tokenizer) <= TEXT["vocab_size"] + 8
    inputs = processor(Image.open(picture), processor.apply_chat_template(talk, add_generation_prompt=True))
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    return folder, picture, out.tolist()


def _elsewhere(saved, tmp_path, version=None):
    folder, picture, expected = saved
    variables = environment(version) | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    # Without this repository, which may be installed in the environment by a .pth file: -S reads none.
    front = [str(other_version(version))] if version else []
    variables["PYTHONPATH"] = ":".join([*front, sysconfig.get_path("purelib")])
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    command = [sys.executable, "-S", "-P", str(script), str(folder), str(picture)]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    found, cached, plain = json.loads(done.stdout.splitlines()[-1])
    assert cached == plain == expected
    return found


def test_the_folder_says_where_its_code_is(saved):
    folder, *_ = saved
    about = json.loads((folder / "config.json").read_text())["auto_map"]
    assert about == {"AutoConfig": "configuration.VLoRAConfig",
                     "AutoModelForImageTextToText": "model.VLoRAForConditionalGeneration"}
    for name in ("configuration", "vision_language", "generator", "injection", "model", "processing", "tokens"):
        text = (folder / f"{name}.py").read_text()
        assert "from papers" not in text and "from common" not in text, f"{name}.py must stand alone"


@pytest.mark.slow
def test_it_loads_where_the_repository_is_not(saved, tmp_path):
    _elsewhere(saved, tmp_path)


@pytest.mark.long
def test_it_loads_there_with_the_newest_transformers(saved, tmp_path):
    assert _elsewhere(saved, tmp_path, NEWEST) == NEWEST


@pytest.mark.long
def test_transformers_own_tests():
    run_suite(SUITE, least=130)


@pytest.mark.long
def test_transformers_own_tests_of_the_newest():
    run_suite(SUITE, NEWEST, least=130)


@pytest.mark.long
def test_the_fixtures_with_the_newest_transformers():
    """Logits, gradients and greedy answers of the authors' code; 5.24 renamed the cache's argument."""
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_parity.py", "test_generation.py", "test_sites.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], env=environment(NEWEST),
        cwd=here.parents[2], capture_output=True, text=True,
    )
    assert not done.returncode, done.stdout[-5000:]
