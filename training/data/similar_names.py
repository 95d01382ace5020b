"""Label names that may mean the same: spelled alike, or close to each other for a text encoder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

# Above these a look is worth while: aeroplane and airplane are 0.82 alike; for MiniLM sofa and couch are 0.79 alike,
# any two of the 80 COCO labels at most 0.72 (bear and teddy bear).
MIN_SPELLING = 0.82
MIN_COSINE = 0.7
_SHARED_LETTERS = 0.4  # cosine of letter pairs and triples from which spelling is compared letter by letter
_BLOCK = 1024  # names that are compared with all others at a time


def similar_names(names: Sequence[str], embeddings: np.ndarray | None = None) -> list[tuple[str, str, str, float]]:
    """Pairs of names that look like one label under two names, the most alike first.

    Args:
        names: The vocabulary.
        embeddings: (num_labels, dim) of a text encoder, as `encode_labels` gives them.

    Returns:
        (name, name, reason, likeness up to 1). Reasons: "form", the same but for case, accents, plural and what divides
        the words; "spelling", few letters and no digits differ, or two neighbours are swapped; "meaning", the cosine of
        the embeddings, once what all of them have in common is taken off.
    """
    forms = [_plain_form(name) for name in names]
    pairs: dict[tuple[int, int], tuple[str, float]] = {}
    if embeddings is not None:
        centred = embeddings - embeddings.mean(axis=0)
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        for start in range(0, len(names), _BLOCK):
            cosine = centred[start : start + _BLOCK] @ centred.T
            for row, column in np.argwhere(np.triu(cosine, start + 1) >= MIN_COSINE).tolist():
                pairs[start + row, column] = "meaning", float(cosine[row, column])
    # Names that differ in a number do so on purpose.
    numbers = np.unique(["/".join(re.findall(r"\d+", form)) for form in forms], return_inverse=True)[1]
    turned: dict[str, list[int]] = {}  # dgo and dog share no pair of letters
    for number, form in enumerate(forms):
        turned.setdefault("".join(sorted(form)), []).append(number)
    for group in turned.values():
        for row, column in combinations(group, 2) if len(group) < 100 else ():
            one, other = forms[row], forms[column]
            differ = [place for place in range(len(one)) if one[place] != other[place]]
            if len(differ) == 2 and differ[1] == differ[0] + 1 and numbers[row] == numbers[column]:
                pairs[row, column] = "spelling", SequenceMatcher(None, one, other, autojunk=False).ratio()
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 3), use_idf=False).fit_transform(forms)
    for start in range(0, len(names), _BLOCK):
        shared = (letters[start : start + _BLOCK] @ letters.T).tocoo()
        likely = (shared.data >= _SHARED_LETTERS) & (shared.col > shared.row + start)
        likely &= numbers[shared.row + start] == numbers[shared.col]
        for row, column in zip((shared.row[likely] + start).tolist(), shared.col[likely].tolist(), strict=True):
            one, other = forms[row], forms[column]
            if one == other:
                pairs[row, column] = "form", 1.0
                continue
            matcher = SequenceMatcher(None, one, other, autojunk=False)
            if matcher.quick_ratio() >= MIN_SPELLING and matcher.ratio() >= MIN_SPELLING:
                pairs[row, column] = "spelling", matcher.ratio()
    ranked = sorted(pairs.items(), key=lambda pair: (-pair[1][1], pair[0]))
    return [(names[row], names[column], reason, likeness) for (row, column), (reason, likeness) in ranked]


def _plain_form(name: str) -> str:
    """A name without case, accents, plural endings, and what divides its words."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = "".join(char for char in unicodedata.normalize("NFKD", words) if not unicodedata.combining(char))
    return "".join(_singular(word) for word in re.findall(r"\w+", words.casefold().replace("_", " "))) or name


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
