"""How good captions and short answers are: BLEU, ROUGE-L, CIDEr-D and exact match, as COCO's evaluation has them.

Texts go in as words joined by spaces; `tokenize` makes them. Scores are on the scale of their definition: BLEU and
ROUGE-L 0 to 1, CIDEr-D 0 to 10 (papers print it times 100), exact match 0 to 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Ngrams = Counter[tuple[str, ...]]

# Words as the Penn treebank has them: clitics stand alone ("do n't", "dog 's").
_WORD = re.compile(r"[a-z]+(?=n't\b)|n't\b|'(?:s|m|re|ve|ll|d)\b|\d+(?:[.,:]\d+)*|\w+(?:[-/&.]\w+)*", re.IGNORECASE)


def tokenize(text: str) -> str:
    """Lower-case words without punctuation, joined by spaces: nearly what COCO's Java tokenizer makes of a caption."""
    return " ".join(_WORD.findall(text.lower()))


def _ngrams(text: str, longest: int = 4) -> Ngrams:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1))


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of a whole corpus (Papineni et al. 2002), each candidate against its several references.

    The brevity penalty takes, for each candidate, the reference nearest to it in length.
    """
    right, total, length, target = [0] * 4, [0] * 4, 0, 0
    for candidate, others in zip(candidates, references, strict=True):
        words = len(candidate.split())
        most: Ngrams = Counter()
        for other in others:
            most |= _ngrams(other)
        length += words
        target += min((len(other.split()) for other in others), key=lambda n: (abs(n - words), n))
        for gram, count in _ngrams(candidate).items():
            right[len(gram) - 1] += min(count, most[gram])
        for n in range(4):
            total[n] += max(0, words - n)
    tiny, small = 1e-15, 1e-9  # COCO's guard against zero counts
    penalty = min(1.0, math.exp(1 - (target + tiny) / (length + tiny))) if length else 0.0
    scores, product = [], 1.0
    for n in range(4):
        product *= (right[n] + tiny) / (total[n] + small)
        scores.append(penalty * product ** (1 / (n + 1)))
    return tuple(scores)


def rouge_l(candidate: str, references: Sequence[str], beta: float = 1.2) -> float:
    """F-measure of the longest common subsequence (Lin 2004), with the best precision and the best recall."""
    words = candidate.split()
    precision = recall = 0.0
    for other in references:
        common = _longest_common(words, other.split())
        precision = max(precision, common / max(1, len(words)))
        recall = max(recall, common / max(1, len(other.split())))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        previous = 0
        for j, other in enumerate(second):
            previous, row[j + 1] = row[j + 1], previous + 1 if word == other else max(row[j + 1], row[j])
    return row[-1]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each candidate (Vedantam et al. 2015); document frequencies are those of the references given.

    TF-IDF vectors of n-grams, n = 1..4; the candidate's weights clipped to the reference's; cosine for each n times
    exp(-difference in length² / 2 sigma²); mean over n and references, times 10. The mean over the candidates is the
    corpus's score.
    """
    counts = [[_ngrams(other) for other in others] for others in references]
    seen: Ngrams = Counter(gram for others in counts for gram in set().union(*others))
    documents = math.log(len(references)) if references else 0.0

    def weigh(grams: Ngrams) -> tuple[dict, list[float], int]:
        weights = {gram: count * (documents - math.log(max(1, seen[gram]))) for gram, count in grams.items()}
        norms = [math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n)) for n in range(1, 5)]
        return weights, norms, sum(count for gram, count in grams.items() if len(gram) == 2)  # COCO counts bigrams

    scores = []
    for candidate, others in zip(candidates, counts, strict=True):
        mine, my_norms, my_length = weigh(_ngrams(candidate))
        total = 0.0
        for other in others:
            theirs, their_norms, their_length = weigh(other)
            dots = [0.0] * 4
            for gram, weight in mine.items():
                if gram in theirs:
                    dots[len(gram) - 1] += min(weight, theirs[gram]) * theirs[gram]
            closeness = math.exp(-((my_length - their_length) ** 2) / (2 * sigma**2))
            products = [a * b for a, b in zip(my_norms, their_norms)]
            total += closeness * sum(dot / product for dot, product in zip(dots, products) if product) / 4
        scores.append(10 * total / len(others))
    return scores


def scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{'bleu1' ... 'bleu4', 'rouge_l', 'cider_d'} of a corpus of captions as they were written (tokenized here)."""
    candidates = [tokenize(text) for text in candidates]
    references = [[tokenize(text) for text in texts] for texts in references]
    rouge = [rouge_l(candidate, others) for candidate, others in zip(candidates, references, strict=True)]
    cider = cider_d(candidates, references)
    return {f"bleu{n}": value for n, value in enumerate(bleu(candidates, references), 1)} | {
        "rouge_l": sum(rouge) / len(rouge), "cider_d": sum(cider) / len(cider)
    }


def exact_match(answer: str, truths: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones, but for case, punctuation and articles."""
    return _plain(answer) in {_plain(truth) for truth in truths}


def _plain(answer: str) -> str:
    """Without articles and punctuation, unless nothing else is there: the answer may be option "A"."""
    plain = tokenize(answer)
    words = [word for word in plain.split() if word not in ("a", "an", "the")]
    return " ".join(words) or plain or answer.strip().lower()
