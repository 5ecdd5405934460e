"""A tiny seeded checkpoint with a tokenizer, and running the command on it: for the tests of the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from halfbyte.runtime.cli import main

SPECIALS = ["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]
TEXT = (
    "once upon a time there was a little dog who saw a big tree. the dog ran to the tree and was happy. " * 8
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }} {{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>a {% endif %}"
)
REFERENCE = ("--backend", "reference")


def tokenizer_json(vocab: int = 120, extra: int = 0) -> str:
    """A byte-level BPE of at most `vocab` tokens over lower-case letters, and `extra` added ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=[*"abcdefghijklmnopqrstuvwxyz<|>/.,", "\u0120"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken(f"[extra {i}]") for i in range(extra)])
    return tokenizer.to_str()


def write_checkpoint(
    folder: Path,
    *,
    tokenizer: bool = True,
    template: bool = False,
    config: dict[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """A llama folder of 160 ids and 128 positions. `config` overrides keys; `change` edits the weights."""
    from safetensors.numpy import save_file

    case = tiny.load_case("llama-plain")
    folder.mkdir(parents=True)
    values = {**case.config, **(config or {})}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "ABSENT"}))
    weights = case.weights()
    if change is not None:
        change(weights)
    save_file(weights, folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer_json())
        (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    if template:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def quiet(capsys: Any, *argv: object) -> str:
    """Run the command, which must succeed; what it printed on stdout."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def fails(capsys: Any, *argv: object) -> str:
    """Run the command, which must fail as a user's error does: status 2 and one line on stderr, which is returned."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return checked_error(status, out, err)


def checked_error(status: int, out: str, err: str) -> str:
    """Assert that a run ended with one line on stderr and status 2; that line."""
    assert "Traceback" not in out + err, err
    assert status == 2, (status, err)
    assert err.startswith("halfbyte: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert len(err) > len("halfbyte: error: \n")
    return err
