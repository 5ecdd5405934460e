"""The models of this user: names for repositories, and the folder where pulled models live.

<home>/models/NAME.hb, with NAME.json beside it saying where it came from, and <home>/downloads, what was fetched.
<home> is $HALFBYTE_HOME, else halfbyte in the platform's folder for data ($XDG_DATA_HOME or ~/.local/share; on
Windows %LOCALAPPDATA%).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import HalfbyteError, UsageError

REPOSITORIES = {
    "deepseek-r1-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "gemma-2-2b": "google/gemma-2-2b-it",
    "gemma-3-270m": "google/gemma-3-270m-it",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "olmo-2-1b": "allenai/OLMo-2-0425-1B-Instruct",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-coder-1.5b": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
"""Short names of repositories on the Hugging Face hub."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Pulled:
    """Where a model came from: a repository, its commit, and how it was converted."""

    repo: str
    commit: str
    recipe: str | None = None
    method: str = "auto"
    file: str | None = None


def home() -> Path:
    """The folder of everything halfbyte keeps for this user; it may not exist yet."""
    chosen = os.environ.get("HALFBYTE_HOME")
    if chosen:
        return Path(chosen)
    if os.name == "nt":
        data = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "halfbyte"


def model_path(name: str) -> Path:
    """Where the model of this name is or would be. Raises UsageError for what cannot be a name."""
    if not _NAME.fullmatch(name) or name.endswith(".hb"):
        raise UsageError(f"{name!r} cannot name a model: use a-z, 0-9, '.', '_' and '-'")
    return home() / "models" / f"{name}.hb"


def find(file: str | os.PathLike[str]) -> Path:
    """The path that a FILE argument means: a file as it is, else a pulled model of that name.

    Raises UsageError for a name that is known but not pulled yet.
    """
    path = Path(file)
    text = os.fspath(file)
    name = text.lower()
    if path.exists() or not isinstance(file, str) or text != path.name or not _NAME.fullmatch(name):
        return path
    if name.endswith(".hb"):
        return path
    pulled = model_path(name)
    if pulled.is_file():
        return pulled
    if name in REPOSITORIES:
        raise UsageError(f"{name} is not on this machine yet: halfbyte pull {name}")
    return path


def repository(text: str) -> tuple[str, str, str]:
    """(name, repository, revision) that `pull` means by NAME, OWNER/REPO or either with :REVISION."""
    place, colon, revision = text.partition(":")
    if colon and not re.fullmatch(r"[\w][\w./-]{0,127}", revision, re.ASCII):
        raise UsageError(f"{revision!r} is not a revision: give a branch, a tag or a commit after the colon")
    known = REPOSITORIES.get(place.lower())
    if known is not None:
        return place.lower(), known, revision or "main"
    if not _is_repository(place):
        raise UsageError(
            f"{place!r} is neither OWNER/REPO nor a known name (those are {', '.join(REPOSITORIES)})"
        )
    return place.split("/")[1].lower(), place, revision or "main"


def origin(name: str) -> Pulled | None:
    """What is known of where a model came from; None for a file that was only put there."""
    try:
        values = json.loads(model_path(name).with_suffix(".json").read_text("utf-8"))
        found = Pulled(**values)
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found.repo, str) and _is_repository(found.repo) else None


def _is_repository(text: str) -> bool:
    return bool(re.fullmatch(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", text, re.ASCII)) and ".." not in text


def record(name: str, pulled: Pulled) -> None:
    """Remember where a model came from."""
    write_json(model_path(name).with_suffix(".json"), asdict(pulled))


def names() -> Iterator[str]:
    """The names of all pulled models, in order."""
    stems = sorted(path.stem for path in (home() / "models").glob("*.hb"))
    yield from (stem for stem in stems if _NAME.fullmatch(stem))


def remove(name: str) -> int:
    """Delete a model; bytes freed. Raises UsageError where there is none."""
    path = model_path(name)
    try:
        nbytes = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        raise UsageError(f"there is no pulled model {name!r} (see halfbyte list)") from None
    path.with_suffix(".json").unlink(missing_ok=True)
    return nbytes


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename. Raises HalfbyteError when it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise HalfbyteError(f"{path}: cannot write: {error.strerror}") from None
