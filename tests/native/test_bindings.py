"""What apps are built with: the CMake package, the example programs, and the classes for a JVM."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from story import story_folder

import halfbyte
from halfbyte.runtime.model import load

EXAMPLES = Path(__file__).resolve().parents[2] / "native" / "examples"
TOOLS = Path(sys.executable).parent
PROMPT = [0, 5, 9, 40]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bindings")
    halfbyte.convert(story_folder(folder / "story"), folder / "story.hb", recipe="q4")
    return folder / "story.hb"


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder of `make native`, with the examples."""
    from halfbyte.runtime.backends.native import library_path

    library = library_path()
    if library is None or not (library.parent / "generate").is_file():
        pytest.skip("the examples are not built: run `make native` (needs a C compiler)")
    return library.parent


def greedy(file: Path, count: int, **options: object) -> list[int]:
    """Python's tokens after PROMPT."""
    session, out = load(file, backend="native", **options).session(), list[int]()
    logits = session.feed(PROMPT)
    for _ in range(count):
        out.append(int(np.argmax(logits)))
        logits = session.feed(out[-1:])
    return out


def run(*command: object) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_gives_the_tokens_of_python(built: Path, file: Path) -> None:
    model = load(file, backend="native")
    for options in ([], ["-t", 2], ["-k", "f16"]):
        kv = "f16" if "f16" in options else "auto"
        want = greedy(file, 20, kv=kv)
        ends = [i for i, t in enumerate(want) if t in model.eos_ids]
        want = want[: ends[0] + 1] if ends else want
        out = run(built / "generate", file, 20, *options, *PROMPT)
        assert [int(i) for i in out.split()] == want
    done = subprocess.run([built / "generate", "absent.hb", "1", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_model_without_a_template_does_not_chat(built: Path, file: Path) -> None:
    done = subprocess.run([built / "chat", file], input=b"Hello\n", capture_output=True)
    assert done.returncode == 2 and b"chat" in done.stderr and done.stderr.count(b"\n") == 1


def test_an_app_finds_the_package(built: Path, file: Path, tmp_path: Path) -> None:
    cmake, prefix = TOOLS / "cmake", tmp_path / "prefix"
    run(cmake, "--install", built, "--prefix", prefix)
    run(cmake, "-S", EXAMPLES / "embed", "-B", tmp_path / "app", "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={TOOLS / 'ninja'}", f"-DCMAKE_PREFIX_PATH={prefix}")  # fmt: skip
    run(cmake, "--build", tmp_path / "app")
    assert f"{file.stat().st_size} bytes mapped" in run(tmp_path / "app" / "embed", file)
    (pc,) = prefix.glob("lib*/**/pkgconfig/halfbyte.pc")
    assert "-lhalfbyte" in pc.read_text() and "Version: 1." in pc.read_text()


def test_a_jvm_gives_the_tokens_of_python(built: Path, file: Path, tmp_path: Path) -> None:
    """The JNI source is linked with the library that is there already: building it again takes minutes."""
    javac, cc = shutil.which("javac"), shutil.which("cc")
    if not javac or not cc:
        pytest.skip("no JDK is installed (Debian: default-jdk-headless)")
    home = Path(javac).resolve().parents[1]
    sources = [*(EXAMPLES / "android" / "src" / "main" / "java").rglob("*.java"),
               EXAMPLES / "android" / "src" / "test" / "java" / "Check.java"]  # fmt: skip
    run(javac, "-Xlint:all,-try", "-Werror", "-d", tmp_path, *sources)
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{home}/include", f"-I{home}/include/linux",
             f"-I{EXAMPLES.parent / 'include'}", f"-L{built}", "-lhalfbyte", f"-Wl,-rpath,{built}"]  # fmt: skip
    jni = EXAMPLES / "android" / "src" / "main" / "cpp" / "halfbyte_jni.c"
    run(cc, jni, "-o", tmp_path / "libhalfbyte_jni.so", *flags)
    prompt = ",".join(map(str, PROMPT))
    java = [home / "bin" / "java", "-Xcheck:jni", f"-Djava.library.path={tmp_path}", "-cp", tmp_path, "Check"]
    lines = run(*java, file, tmp_path / "saved", prompt, 12).splitlines()
    lines = [line for line in lines if not line.startswith(("WARNING", "Warning", "\t"))]
    assert [int(i) for i in lines[0].split(",")] == greedy(file, 12, kv="k8v8")
    assert lines[1] == "true"
    assert lines[2] == "-10 cancelled"
    assert lines[3] == "true"
    assert lines[4].startswith("-9 absent.hb: ")


def test_answers_of_the_assistant_are_replayed(built: Path, file: Path, tmp_path: Path, capsys) -> None:
    """An app without Python keeps a log; Python gives every answer again, with the same keys and values."""
    from halfbyte.runtime.cli import main

    log, questions = tmp_path / "log.jsonl", 'Once upon a time\nIt "liked" to count: one, “two”\n\nThe end.\n'
    for part in (questions, "Once more\n"):
        done = subprocess.run(
            [built / "assistant", file, log, "-n", "9", "-t", "2"], input=part.encode(), capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert main(["replay", str(log)]) == 0
    assert "4 of 4 answers are the same" in capsys.readouterr().out
    log.write_bytes(log.read_bytes().replace(b'"finish":"length"', b'"finish":"stop"', 1))
    assert main(["replay", str(log)]) == 1
    assert "was changed" in capsys.readouterr().out
