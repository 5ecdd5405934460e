"""`pull`, `list` and `rm` against a hub on loopback: the real download code, with real faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import COMMIT, Hub, git_digest, serving
from small_model import REFERENCE, fails, quiet, write_checkpoint

import halfbyte
from halfbyte.formats.errors import CheckpointError, HalfbyteError, UsageError
from halfbyte.runtime import hub as downloader
from halfbyte.runtime import library
from halfbyte.runtime.hub import RemoteFile, choose

REPO = "Acme/Tiny-1B"
WEIGHTS = "model.safetensors"
UNNEEDED = {
    "pytorch_model.bin": b"p" * 999,
    "consolidated.safetensors": b"c",
    "README.md": b"r",
    "onnx/model.safetensors": b"o",
    "tokenizer.model": b"t",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "c", template=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home; nothing of this machine's hub cache or log-in is seen."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HALFBYTE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what a cut connection loses at most
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def hub(home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that $HF_ENDPOINT names."""
    with serving(REPO, checkpoint, **UNNEEDED) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def pull(capsys: pytest.CaptureFixture, *options: object) -> str:
    return quiet(capsys, "pull", REPO, "--recipe", "q8", "--name", "tiny", *options)


def test_only_what_is_needed_is_fetched(hub, home, checkpoint, capsys):
    out = pull(capsys)
    assert out.startswith("tiny: ") and out.count("\n") == 1
    assert hub.fetched() == {p.name for p in checkpoint.iterdir()}
    made = halfbyte.convert(checkpoint, home / "direct.hb", recipe="q8")
    ours, theirs = (halfbyte.load(f, backend="reference") for f in ("tiny", made))
    assert [t.digest for t in ours.file.tensors] == [t.digest for t in theirs.file.tensors]
    assert ours.chat_template and ours.has_tokenizer


def test_a_name_works_wherever_a_file_does(hub, capsys, monkeypatch, tmp_path):
    pull(capsys)
    monkeypatch.chdir(tmp_path)
    assert quiet(capsys, "run", "tiny", "-p", "once", "-n", 2, *REFERENCE)
    assert quiet(capsys, "run", "TINY", "-p", "once", "-n", 2, *REFERENCE)
    assert json.loads(quiet(capsys, "info", "tiny", "--json"))["path"].endswith("tiny.hb")
    (tmp_path / "tiny").write_bytes(b"a file of that name comes first")
    assert "tiny" in fails(capsys, "info", "tiny")


def test_list_and_rm(hub, home, capsys):
    assert "halfbyte pull" in quiet(capsys, "list")
    pull(capsys)
    (row,) = json.loads(quiet(capsys, "list", "--json"))["models"]
    assert (row["name"], row["repository"], row["commit"], row["recipe"]) == ("tiny", REPO, COMMIT, "q8")
    assert REPO in quiet(capsys, "list")
    assert "deleted" in quiet(capsys, "rm", "tiny")
    assert [p for p in home.rglob("*") if p.is_file()] == []
    assert "no pulled model" in fails(capsys, "rm", "tiny")
    assert "cannot name" in fails(capsys, "rm", "../tiny")


def test_the_download_stays_while_another_model_came_of_it(hub, home, capsys):
    pull(capsys)
    quiet(capsys, "pull", REPO, "--recipe", "f32")
    assert list(library.names()) == ["tiny", "tiny-1b-f32"]
    asked = len(hub.asked)
    quiet(capsys, "rm", "tiny")
    assert (home / "downloads" / "Acme--Tiny-1B" / COMMIT / WEIGHTS).is_file()
    pull(capsys)
    assert len(hub.asked) == asked


def test_a_second_pull_does_nothing(hub, capsys):
    pull(capsys)
    asked = len(hub.asked)
    assert "up to date" in pull(capsys)
    assert len(hub.asked) == asked
    assert "up to date" not in pull(capsys, "--force")


def test_a_name_is_not_taken_over(hub, capsys):
    pull(capsys)
    assert "taken by Acme/Tiny-1B" in fails(capsys, "pull", "qwen3-0.6b", "--name", "tiny")


def test_discard(hub, home, capsys):
    pull(capsys, "--discard")
    assert not (home / "downloads" / "Acme--Tiny-1B").exists()
    assert library.model_path("tiny").is_file()


def test_a_cut_connection_goes_on_where_it_stopped(hub, capsys):
    hub.cut[WEIGHTS] = 1000
    pull(capsys)
    assert [r for n, r in hub.asked if n == WEIGHTS] == [None, "bytes=1000-"]


def test_a_later_run_goes_on_where_the_first_stopped(hub, home, capsys):
    hub.cut[WEIGHTS] = 1000
    hub.broken.add(WEIGHTS)
    assert "status 500" in fails(capsys, "pull", REPO, "--recipe", "q8", "--name", "tiny")
    part = home / "downloads" / "Acme--Tiny-1B" / COMMIT / f"{WEIGHTS}.part"
    assert part.stat().st_size == 1000
    assert list(library.names()) == []
    hub.broken.clear()
    hub.asked.clear()
    pull(capsys)
    assert hub.asked == [(WEIGHTS, "bytes=1000-")]


def test_a_wrong_digest(hub, home, capsys):
    hub.lies.add(WEIGHTS)
    assert "digest" in fails(capsys, "pull", REPO)
    assert not list((home / "downloads").rglob("model.safetensors*"))
    assert list(library.names()) == []


def test_a_damaged_part_is_found(hub, home, capsys):
    place = home / "downloads" / "Acme--Tiny-1B" / COMMIT
    place.mkdir(parents=True)
    (place / f"{WEIGHTS}.part").write_bytes(b"x" * 1000)
    assert "digest" in fails(capsys, "pull", REPO)
    pull(capsys)
    assert [r for n, r in hub.asked if n == WEIGHTS] == ["bytes=1000-", None]


def test_offline(hub, home, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    why = fails(capsys, "pull", REPO, "--recipe", "q8", "--name", "tiny")
    assert "cannot be reached" in why and "never downloaded" in why
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    pull(capsys)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    quiet(capsys, "rm", "tiny", "--keep-download")
    pull(capsys)
    (home / "downloads" / "Acme--Tiny-1B" / COMMIT / WEIGHTS).unlink()
    assert "model.safetensors is not here" in fails(capsys, "pull", REPO, "--recipe", "q8", "--name", "tiny")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("gated", "is gated: accept its terms"),
        ("missing", "no such repository"),
        ("revision", "has no revision 'v9'"),
        ("down", "status 503"),
    ],
)
def test_refusals(hub, capsys, what, said):
    hub.gated, hub.status = what == "gated", 503 if what == "down" else 0
    repo = {"missing": "Acme/Other", "revision": f"{REPO}:v9"}.get(what, REPO)
    assert said in fails(capsys, "pull", repo)


@pytest.mark.parametrize("text", ["no/../such", "a/b/c", "nonesuch", "", "a/b:..\\x", "a/b:", "https://x/y"])
def test_what_is_no_repository(home, capsys, text):
    fails(capsys, "pull", text)
    assert not home.exists()


def test_a_token_is_sent(hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(capsys)
    assert hub.token == "Bearer hf_secret"


def test_what_the_hubs_cache_holds_is_not_fetched(hub, tmp_path, capsys):
    place = tmp_path / "cache" / "models--Acme--Tiny-1B" / "snapshots" / COMMIT
    place.mkdir(parents=True)
    (place / WEIGHTS).write_bytes(hub.files[WEIGHTS])
    (place / "config.json").write_bytes(b"{}")  # damaged: it is fetched anyway
    pull(capsys)
    assert WEIGHTS not in hub.fetched() and "config.json" in hub.fetched()


def test_the_command_itself(hub, home, tmp_path):
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HALFBYTE_HOME": str(home), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", "import sys; from halfbyte.runtime.cli import main; sys.exit(main())"]
    command += ["pull", REPO, "--recipe", "f32"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("tiny-1b-f32: ")


def listed(*names: str) -> list[RemoteFile]:
    return [RemoteFile(n, 1, "git", git_digest(b"x")) for n in names]


def test_the_choice_of_files():
    def chosen(*names: str, file: str | None = None) -> list[str]:
        return [f.name for f in choose("a/b", listed(*names), file)]

    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert chosen(*shards, index, "model.fp16-00001-of-00002.safetensors") == [index, *shards]
    assert chosen("weights.safetensors", "consolidated.safetensors") == ["weights.safetensors"]
    assert chosen("m.gguf", "config.json", file="m.gguf") == ["m.gguf"]
    assert chosen(WEIGHTS, "tokenizer.model") == ["tokenizer.model", WEIGHTS]
    for names, said in (
        (("m.gguf",), "--file, such as m.gguf"),
        (("pytorch_model.bin",), "pickled"),
        (("README.md", "../model.safetensors", "x/model.safetensors"), "no .safetensors"),
    ):
        with pytest.raises(CheckpointError, match=said):
            chosen(*names)
    with pytest.raises(CheckpointError, match="no file"):
        chosen(WEIGHTS, file="../model.safetensors")


def test_names(home):
    for name, repo in library.REPOSITORIES.items():
        assert library.repository(name) == (name, repo, "main")
        assert library.repository(repo + ":v1") == (repo.split("/")[1].lower(), repo, "v1")
    with pytest.raises(UsageError, match="is not on this machine yet"):
        library.find("Qwen3-0.6B")
    assert library.find("some.hb") == Path("some.hb")


def test_homes(monkeypatch, tmp_path):
    monkeypatch.delenv("HALFBYTE_HOME", raising=False)
    monkeypatch.setattr(os, "name", "posix")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert library.home() == tmp_path / "halfbyte"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.home() == tmp_path / ".local" / "share" / "halfbyte"


def test_two_pulls_at_once(hub, home):
    folder = downloader.downloads(REPO)
    folder.mkdir(parents=True)
    with downloader._locked(folder, REPO), pytest.raises(HalfbyteError, match="another process"):
        downloader.fetch(REPO, "main")


def test_no_name_leaves_the_store(home, capsys, tmp_path):
    outside = tmp_path / "x.hb"
    outside.write_bytes(b"mine")
    for name in (
        "../x",
        "..",
        ".",
        "/x",
        str(outside),
        "a/b",
        "a\\b",
        "",
        "x\n",
        "x\0",
        "X",
        "~",
        "x" * 97,
        "a.hb",
    ):
        for argv in (("rm", name), ("pull", "qwen3-0.6b", "--name", name)):
            assert "cannot name" in fails(capsys, *argv)
    for repo in ("../..", "a/..", "a/b/c", "/a", "a/b:../c", "a/b:", "a b/c", "\u00e9/a"):
        fails(capsys, "pull", repo)
    assert outside.read_bytes() == b"mine" and not list(library.names())


def test_rm_trusts_no_path_and_deletes_all_or_nothing(home, capsys):
    path = library.model_path("tiny")
    path.parent.mkdir(parents=True)
    for repo in ("..", "../..", "."):
        path.write_bytes(b"x")
        library.write_json(path.with_suffix(".json"), {"repo": repo, "commit": "1"})
        assert "cannot name" in fails(capsys, "rm", "tiny", "../tiny") and path.exists()
        assert library.origin("tiny") is None
        quiet(capsys, "rm", "tiny", "tiny")
        assert path.parent.is_dir() and not path.exists()
