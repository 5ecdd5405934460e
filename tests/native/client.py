"""native/tests/client.c, an app without Python, held against the Python runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from story import story_folder
from targets import Target

import halfbyte
from halfbyte.runtime.model import Model, load
from halfbyte.runtime.session import Session

COUNT = 10  # tokens
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXTS = ["Once upon a time", "I'll count: one, \u00e9\u0301 \u4f60\u597d \U0001f916  two\t!", " "]


def chatty_file(folder: Path) -> Path:
    """A file with tokenizer and chat template, whose path takes more than ASCII."""
    path = folder / "\u00e9\u4f60\U0001f916" / "story.hb"
    path.parent.mkdir()
    halfbyte.convert(story_folder(folder / "hf", template=TEMPLATE, context=256), path, recipe="q4")
    return path


def continued(model: Model, session: Session, ids: list[int]) -> list[int]:
    """Up to COUNT greedy tokens after ids; an end of text ends them."""
    out = list[int]()
    logits = session.feed(ids)
    while len(out) < COUNT and not (out and out[-1] in model.eos_ids):
        out.append(int(np.argmax(logits)))
        logits = session.feed(out[-1:])
    return out


def check_client(target: Target, file: Path, folder: Path) -> None:
    """Its texts, ids and tokens are Python's, and Python goes on with the session that it saved."""
    model = load(file, backend="native")
    assert model.tokenizer
    saved, asset, offsets = file.parent / f"saved.{target.name}", folder / "asset", (5 << 30, (6 << 30) + 100)
    with asset.open("wb") as f:  # beyond 32 bits, and mostly a hole
        for offset in offsets:
            f.seek(offset)
            f.write(file.read_bytes())
    lines = [str(file), str(saved), str(asset), *map(str, offsets), *TEXTS]
    (folder / "script").write_bytes("".join(f"{line}\n" for line in lines).encode())
    *pairs, tokens, end = target.run("client", folder / "script").decode().split("\n")
    ids = [[int(i) for i in line.split()] for line in pairs[::2]]
    assert ids == [model.tokenizer.encode(t) for t in TEXTS]
    assert pairs[1::2] == TEXTS and end == ""
    want = list[int]()
    logits = (session := model.session()).feed(ids[0])
    for _ in range(COUNT):
        want.append(int(np.argmax(logits)))
        logits = session.feed(want[-1:])
    assert [int(i) for i in tokens.split()] == want
    loaded = Session.load(model, saved)
    assert continued(model, loaded, [5]) == continued(model, session, [5])
