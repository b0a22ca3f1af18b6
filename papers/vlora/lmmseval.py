"""VLoRA for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), whose tasks bring their own prompts and scores.

With this repository on the PYTHONPATH, in a Python file of yours that ends in ``lmms_eval.__main__.cli_evaluate()``::

    import papers.vlora.lmmseval

then ``python yours.py --model vlora --model_args model_path=/path/to/model --tasks mme,textvqa_val --batch_size 1``.
lmms-eval itself is not installed by this repository: the adapter was tested against stand-ins for its classes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.data.loader import progress
from common.run import Options, UserError, start_world
from papers.vlora.data import assistant_message
from papers.vlora.evaluate import answer, load, losses

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.registry import register_model
except ImportError:  # only the class below needs it
    lmms = object

    def register_model(*_names: str):
        return lambda kind: kind


@register_model("vlora")
class VLoRA(lmms):
    """`model_path`: a model folder, a run folder, or shipped[:NAME]."""

    def __init__(self, model_path: str, device: str = "auto", max_new_tokens: int = 128, **_options: Any):
        if lmms is object:
            raise UserError("lmms-eval is not installed: https://github.com/EvolvingLMMs-Lab/lmms-eval")
        super().__init__()
        self.world = start_world(Options(device=device))
        self.model, self.processor = load(Path(model_path), self.world.device)
        self.max_new_tokens = max_new_tokens

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers; of several images the first is seen: the paper's model takes one."""
        replies = []
        for request in progress(requests, "answers"):
            text, options, visuals, number, task, split = request.args
            images, turns = self._turns(text, visuals(self.task_dict[task][split][number]))
            (reply,) = answer(
                self.model, self.processor, [images], [turns], self.world,
                options.get("max_new_tokens", self.max_new_tokens),
            )
            for end in options.get("until") or []:
                reply = reply.partition(end)[0] if end else reply
            replies.append(reply)
        return replies

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(mean negative loss of the continuation, whether greedy decoding gives it)"""
        found = []
        for request in progress(requests, "likelihoods"):
            text, target, visuals, number, task, split = request.args
            doc = self.task_dict[task][split][number]
            target = target(doc) if callable(target) else target
            images, turns = self._turns(text, visuals(doc))
            (loss,) = losses(
                self.model, self.processor, [images], [[*turns, assistant_message(target)]], self.world
            ).tolist()
            (reply,) = answer(self.model, self.processor, [images], [turns], self.world, self.max_new_tokens)
            found.append((loss, reply == target.strip()))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("VLoRA answers one round: tasks of several rounds are not for it")

    def _turns(self, text: str, pictures: Sequence[Any] | None) -> tuple[list[Any], list[dict[str, Any]]]:
        images = [picture.convert("RGB") for picture in (pictures or [])[:1]]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text.replace("<image>", "").strip()}]
        return images, [{"role": "user", "content": content}]
