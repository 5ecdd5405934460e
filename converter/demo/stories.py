"""The text the demo model learns from: the real story sample, split, and cleaned model samples."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SEPARATOR = "<|endoftext|>"
HELD_OUT_SHARE = 0.1
PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
    }
)


def split_stories(text: str) -> list[str]:
    """Cut a file of stories at its separators; plain quotes and dashes, no trailing or doubled blanks."""
    stories = (re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", s)) for s in text.split(SEPARATOR))
    return [story for s in stories if (story := s.translate(PLAIN).strip())]


def real_stories(data: Path) -> tuple[list[str], list[str]]:
    """The real TinyStories sample as (training, held-out) lists; the last tenth is never trained on."""
    path = data / "text" / "tinystories.txt"
    stories = [s for s in split_stories(path.read_text(encoding="utf-8", errors="replace")) if len(s) > 100]
    cut = len(stories) - max(1, int(len(stories) * HELD_OUT_SHARE))
    return stories[:cut], stories[cut:]


def first_sentence(story: str) -> str:
    """The story's text up to its first full stop, at most 160 characters, else nothing."""
    match = re.match(r"[^.!?\n]{10,158}[.!?]", story)
    return match[0] if match else ""


def is_whole(story: str) -> bool:
    """True for a story of usual length and characters that ends its last sentence and does not loop."""
    if (
        not 150 <= len(story) <= 2500
        or not re.fullmatch(r"[ -~\n]+", story)
        or re.search(r"[<>{}\[\]|\\]", story)
    ):
        return False
    if story[-1] not in '.!?"' or story.count('"') % 2:
        return False
    words = re.findall(r"[a-z']+", story.lower())
    if any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2)):
        return False
    sentences = Counter(s.strip() for s in re.split(r"[.!?\n]", story) if len(s.strip()) > 12)
    if sentences and sentences.most_common(1)[0][1] > 2:
        return False
    runs = Counter(tuple(words[i : i + 6]) for i in range(len(words) - 5))
    return not runs or runs.most_common(1)[0][1] <= 3


def clean(stories: Iterable[str], *, rare: int = 5) -> list[str]:
    """Keep whole stories, once each, made only of words that at least `rare` of them use.

    The last rule drops the words a small model makes up: each such word is seen once or twice.
    """
    whole = [s for s in dict.fromkeys(stories) if is_whole(s)]
    words = [set(re.findall(r"[a-z']+", s.lower())) for s in whole]
    used = Counter(word for row in words for word in row)
    return [s for s, row in zip(whole, words) if all(used[word] >= rare for word in row)]
