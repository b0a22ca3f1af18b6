"""VLoRA for VLMEvalKit, which runs the paper's benchmarks (MMBench, MME, ScienceQA, HallusionBench, MMMU, CCBench).

In VLMEvalKit's ``vlmeval/config.py``, with this repository on the PYTHONPATH::

    from papers.vlora.vlmevalkit import VLoRA
    supported_VLM["vlora_7b"] = partial(VLoRA, model_path="/path/to/model")

then ``python run.py --data MMBench_DEV_EN MME --model vlora_7b``. Its judges extract the answers and compute the
scores; nothing of that is repeated here. VLMEvalKit itself is not installed by this repository: the adapter was tested
against a stand-in for its base class, not against the toolkit.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.data.picture import read_picture
from common.run import Options, UserError, start_world
from papers.vlora.evaluate import answer, load

try:
    from vlmeval.dataset import DATASET_TYPE
    from vlmeval.vlm.base import BaseModel
except ImportError:  # only the class below needs it
    BaseModel = object

# What LLaVA's instruction data end their questions with, and so what such models were trained to be asked; the
# toolkit's own prompts are others.
LETTER = "Answer with the option's letter from the given choices directly.", "请直接回答选项字母。"
SHORT = "Answer the question directly.", "请直接回答问题。"


def multiple_choice(line: Mapping[str, Any]) -> str:
    """Hint, question, lettered options, and how to answer, in the question's language."""
    def there(key: str) -> bool:
        return key in line and isinstance(line[key], str | int | float) and line[key] == line[key]  # nan: no value

    question = f"{line['hint']}\n{line['question']}" if there("hint") else str(line["question"])
    options = [letter for letter in string.ascii_uppercase if there(letter)]
    question += "".join(f"\n{letter}. {line[letter]}" for letter in options)
    chinese = re.search("[\u4e00-\u9fff]", question) is not None
    return f"{question}\n{(LETTER if options else SHORT)[chinese]}"


class VLoRA(BaseModel):
    """`model_path`: a model folder or a run folder. `options` go to generate."""

    INSTALL_REQ = False
    INTERLEAVE = False  # one image to a question

    def __init__(self, model_path: str, max_new_tokens: int = 128, device: str = "auto", **options: Any):
        if BaseModel is object:
            raise UserError("VLMEvalKit is not installed: https://github.com/open-compass/VLMEvalKit")
        super().__init__()
        self.world = start_world(Options(device=device))
        self.model, self.processor = load(Path(model_path), self.world.device)
        self.max_new_tokens, self.options = max_new_tokens, options

    def use_custom_prompt(self, dataset: str) -> bool:
        """Multiple choice: MMBench, ScienceQA, MMMU, CCBench."""
        return DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> list[dict[str, str]]:
        """The row of a benchmark as LLaVA's adapter in VLMEvalKit asks it."""
        paths = self.dump_image(line, dataset)
        words = multiple_choice(line)
        return [{"type": "image", "value": str(path)} for path in paths] + [{"type": "text", "value": words}]

    @torch.no_grad()
    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Answer to [{"type": "image", "value": path}, {"type": "text", "value": words}, ...]; one image at most.

        Of several images, as some benchmarks have them, the first is seen: the paper's model takes one.
        """
        paths = [part["value"] for part in message if part["type"] == "image"][:1]
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        content = [{"type": "image"}] * len(paths) + [{"type": "text", "text": text}]
        images = [read_picture(path) for path in paths]
        turns = [{"role": "user", "content": content}]
        (reply,) = answer(
            self.model, self.processor, [images], [turns], self.world, self.max_new_tokens, **self.options
        )
        return reply
