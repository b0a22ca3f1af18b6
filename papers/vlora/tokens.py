"""Text -> token ids as the authors' stack made them, which was older (transformers 4.37.2, tokenizers 0.15.2).

Today's LLaMA tokenizers differ in three ways: after a special piece no blank piece stands; none is put before a text
that begins with a blank; and where a folder has nothing but SentencePiece's ``tokenizer.model``, runs of blanks join
first, because the merges are not ordered by the pieces' scores. The released weights never saw such ids.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence

BLANK = "▁"


def mend(tokenizer: Any) -> None:
    """Changes a tokenizer of LLaMA's kind, in place; others stay what they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__name__.startswith("Llama") or not isinstance(backend.model, BPE):
        return
    kept = json.loads(backend.to_str())["model"]
    vocab = kept["vocab"]
    merges = merges_by_score(vocab)
    if [tuple(pair) for pair in kept["merges"]] != merges:
        backend.model = BPE(
            vocab, merges, unk_token=kept["unk_token"], fuse_unk=kept["fuse_unk"], byte_fallback=kept["byte_fallback"]
        )
    # Every stretch between special pieces has a blank of its own in front, also where it begins with one already.
    backend.normalizer = Sequence([Prepend(BLANK), Replace(" ", BLANK)])
    backend.pre_tokenizer = None


def merges_by_score(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs that make a piece, the best first: pieces have their ids in the order of their scores, but for runs of
    blanks, whose score is the lowest of all."""
    found = []
    for piece, number in vocab.items():
        last = not piece.strip(BLANK)
        for i in range(1, len(piece)):
            left, right = vocab.get(piece[:i]), vocab.get(piece[i:])
            if left is not None and right is not None:
                found.append((last, number, left, right, piece[:i], piece[i:]))
    return [(left, right) for *_, left, right in sorted(found)]


class Stretches:
    """Encodes what stands between an image's marks, in which the mark's own letters are ordinary text."""

    def __init__(self, tokenizer: Any, mark: str):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != mark]
        for key in ("truncation", "padding"):
            content[key] = None
        self.backend = Tokenizer.from_str(json.dumps(content))

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each of them where its letters begin and end."""
        if not text:
            return [], []
        found = self.backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets
