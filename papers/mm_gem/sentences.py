"""MM-GEM as sentence-transformers takes it: texts and pictures to vectors of one space.

    model = papers.mm_gem.sentences.open_model("RUN/model")
    model.similarity(model.encode([picture]), model.encode(["a red circle ."]))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from common.run import model_folder
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.processing import MMGEMProcessor


class MMGEMModule(InputModule):
    """The only module of a `SentenceTransformer`, which hands it texts or PIL pictures, a batch of the one or other."""

    def __init__(self, model: MMGEMModel, processor: MMGEMProcessor):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer

    @property
    def modalities(self) -> list[str]:
        return ["text", "image"]

    @property
    def max_seq_length(self) -> int:
        return self.processor.max_text_length

    def get_embedding_dimension(self) -> int:
        return self.model.config.joint_width

    def preprocess(
        self, inputs: Sequence[str] | Sequence[Image.Image], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """input_ids and attention_mask of texts, or pixel_values of pictures."""
        if isinstance(inputs[0], Image.Image):
            return {"pixel_values": self.processor.pixels(inputs)}
        return self.processor.texts([(prompt or "") + text for text in inputs])

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        if "pixel_values" in features:
            found = self.model.encode_image(features["pixel_values"])
        else:
            found = self.model.encode_text(features["input_ids"], features["attention_mask"])
        return features | {"sentence_embedding": found}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        model_folder.save(Path(output_path), self.model, self.processor)

    @classmethod
    def load(cls, model_name_or_path: str, *_: Any, **__: Any) -> MMGEMModule:
        folder = model_folder.model_folder(Path(model_name_or_path))
        return cls(model_folder.load(AutoModel, folder), model_folder.load(AutoProcessor, folder))


def open_model(folder: str | Path, device: str | None = None) -> SentenceTransformer:
    """A model folder, or a run folder, as a `SentenceTransformer`."""
    return SentenceTransformer(modules=[MMGEMModule.load(str(folder))], device=device)
