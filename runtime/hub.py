"""Checkpoints from a Hugging Face hub: only the files a conversion reads, resumed, each checked by its digest.

The hub is asked for its list of files by `huggingface_hub` ($HF_ENDPOINT, $HF_TOKEN and its log-in are honoured), and
every file is compared with the digest of that list: SHA-256 where git-lfs stores it, else git's own SHA-1. What other
tools have in the hub's cache already is taken from there. A file that was cut off goes on where it stopped, in this
run or a later one; what is complete serves without a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from halfbyte.formats.errors import CheckpointError, HalfbyteError, UsageError
from halfbyte.runtime import library

Progress = Callable[[str, int, int], None]

_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "quantize_config.json",
    "quant_config.json",
    "model.safetensors.index.json",
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)
_PLAIN = re.compile(r"\w[\w.+-]*", re.ASCII)  # a file name that can name nothing outside its folder
_MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `digest` is hexadecimal, by `sha256` or `git` (SHA-1 of a git blob)."""

    name: str
    size: int
    kind: str
    digest: str


@dataclass(frozen=True)
class Fetched:
    """A checkpoint on this disk: `path` is what to convert."""

    commit: str
    path: Path
    files: tuple[Path, ...]


class UnreachableError(HalfbyteError):
    """The hub did not answer."""


def fetch(repo: str, revision: str, file: str | None = None, progress: Progress | None = None) -> Fetched:
    """Download what a conversion of a repository needs, or find it on this disk.

    file      take this one file (a .gguf) instead of the repository's safetensors
    progress  called with (file, bytes done, bytes in all)

    Raises HalfbyteError, in one line, where the repository is missing, gated, or holds nothing to convert, where a
    file's digest does not match, and where neither the hub nor an earlier download has it.
    """
    folder = downloads(repo)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, repo):
        known = _read_manifest(folder)
        offline: UnreachableError | None = None
        try:
            commit, listed = _listing(repo, revision)
        except UnreachableError as error:
            offline = error
            commit = known["revisions"].get(revision, revision)
            if commit not in known["commits"]:
                raise UnreachableError(f"{error}, and {repo}:{revision} was never downloaded") from None
            listed = [RemoteFile(**f) for f in known["commits"][commit]]
        else:
            known["revisions"][revision] = commit
            known["commits"][commit] = [asdict(f) for f in listed]
            library.write_json(folder / _MANIFEST, known)
        chosen = choose(repo, listed, file)
        place = folder / commit
        place.mkdir(exist_ok=True)
        total, done = sum(f.size for f in chosen), 0
        for one in chosen:

            def report(nbytes: int, name: str = one.name, before: int = done) -> None:
                if progress:
                    progress(name, before + nbytes, total)

            if not _here(repo, commit, one, place / one.name):
                if offline is not None:
                    raise UnreachableError(f"{offline}, and {one.name} is not here yet")
                _download(repo, commit, one, place / one.name, report)
            report(one.size)
            done += one.size
    return Fetched(commit, place / file if file else place, tuple(place / f.name for f in chosen))


def downloads(repo: str) -> Path:
    """The folder of what was fetched of a repository."""
    return library.home() / "downloads" / repo.replace("/", "--")


def choose(repo: str, listed: list[RemoteFile], file: str | None = None) -> list[RemoteFile]:
    """The files to fetch of those at the top of a repository. Raises CheckpointError where there are no weights."""
    top = {f.name: f for f in listed if _PLAIN.fullmatch(f.name)}
    if file is not None:
        if file not in top:
            raise CheckpointError(f"{repo} has no file {file!r}")
        return [top[file]]
    weights = [n for n in top if n.endswith(".safetensors")]
    shards = [n for n in weights if _SHARD.fullmatch(n)]
    if "model.safetensors" in top:
        weights = ["model.safetensors"]
    elif shards:
        weights = shards
    else:  # Mistral's repositories hold the same weights once more, in files of other names
        weights = [n for n in weights if not n.startswith("consolidated")]
    if not weights:
        ggufs = sorted(n for n in top if n.endswith(".gguf"))
        if ggufs:
            raise CheckpointError(f"{repo} holds GGUF files; choose one with --file, such as {ggufs[0]}")
        if any(n.endswith((".bin", ".pth", ".pt")) for n in top):
            raise CheckpointError(f"{repo} holds only pickled PyTorch weights, which halfbyte does not read")
        raise CheckpointError(f"{repo} holds no .safetensors weights")
    small = [n for n in _SMALL if n in top]
    if "tokenizer.json" not in top and "tokenizer.model" in top:
        small.append("tokenizer.model")
    return [top[n] for n in (*small, *sorted(weights))]


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether a file on this disk has the size and the digest."""
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.kind == "sha256" else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as data:
        while part := data.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest() == file.digest


def _listing(repo: str, revision: str) -> tuple[str, list[RemoteFile]]:
    """(commit, files) of a revision, from the hub."""
    hub = _library()
    with _explained(repo, revision):
        info = hub.HfApi(endpoint=_endpoint()).model_info(
            repo, revision=revision, files_metadata=True, timeout=20
        )
    files = []
    for sibling in info.siblings or []:
        lfs = sibling.lfs
        kind, digest = ("sha256", lfs["sha256"]) if lfs else ("git", sibling.blob_id)
        if sibling.size is not None and digest:
            files.append(RemoteFile(sibling.rfilename, int(sibling.size), kind, str(digest).lower()))
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise HalfbyteError(f"{repo}: the hub's answer names no commit")
    return str(info.sha), files


def _here(repo: str, commit: str, file: RemoteFile, path: Path) -> bool:
    """Whether `path` is the file: from an earlier run, which checked it, or from the hub's cache."""
    if path.is_file() and path.stat().st_size == file.size:
        return True
    cached = _library().try_to_load_from_cache(repo, file.name, revision=commit)
    if not isinstance(cached, str) or not matches(Path(cached), file):
        return False
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(cached)
    except OSError:
        shutil.copyfile(cached, path)
    return True


def _download(repo: str, commit: str, file: RemoteFile, path: Path, report: Callable[[int], None]) -> None:
    """Fetch a file to `path`.part, from where that ends, check it and rename it."""
    hub = _library()
    part = path.with_name(path.name + ".part")
    with part.open("ab") as out:
        start = out.tell()
        if start > file.size:
            out.truncate(start := 0)
        url = hub.hf_hub_url(repo, file.name, revision=commit, endpoint=_endpoint())
        with _explained(repo, commit):
            hub.file_download.http_get(
                url,
                _Reporting(out, report),
                resume_size=start,
                headers=hub.utils.build_hf_headers(),
                expected_size=file.size,
            )
    if not matches(part, file):
        part.unlink()
        raise HalfbyteError(
            f"{repo}: {file.name} arrived damaged (its digest does not match); pull again to fetch it anew"
        )
    os.replace(part, path)


class _Reporting:
    """A file that tells how far it was written."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]):
        self._file, self._report = file, report

    def write(self, data: bytes) -> int:
        """Write on."""
        written = self._file.write(data)
        self._report(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise UsageError("pull needs huggingface_hub: pip install 'halfbyte[hub]'") from None
    huggingface_hub.utils.disable_progress_bars()  # ours is the bar
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    return huggingface_hub


def _endpoint() -> str | None:
    """$HF_ENDPOINT as it is now; the library has read it when it was imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


@contextlib.contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    """Turn what the library raises into one line each."""
    from huggingface_hub import errors

    try:
        yield
    except (HalfbyteError, MemoryError):
        raise
    except errors.GatedRepoError:
        raise HalfbyteError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in"
            " (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HalfbyteError(
            f"{repo}: there is no such repository, or it is private (then log in: hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise HalfbyteError(f"{repo} has no revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise UsageError(" ".join(str(error).split())[:200]) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise HalfbyteError(f"{repo}: the hub answered with status {status}; try again later") from None
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        network = {"TransportError", "ConnectionError", "TimeoutError"}  # of httpx, requests and Python
        if network & {c.__name__ for c in type(error).__mro__}:
            raise UnreachableError(f"{repo}: the hub cannot be reached ({why})") from None
        if (isinstance(error, OSError) and error.errno is None) or isinstance(error, ValueError):
            raise HalfbyteError(f"{repo}: the hub's answer makes no sense ({why})") from None
        raise


@contextlib.contextmanager
def _locked(folder: Path, repo: str) -> Iterator[None]:
    """One download of a repository at a time."""
    _library()
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise HalfbyteError(f"another process is pulling {repo}") from None


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{"revisions": {revision: commit}, "commits": {commit: files}} of what was listed before."""
    try:
        found = json.loads((folder / _MANIFEST).read_text("utf-8"))
        for files in found["commits"].values():
            for f in files:
                RemoteFile(**f)
        return {"revisions": dict(found["revisions"]), "commits": dict(found["commits"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {"revisions": {}, "commits": {}}
