"""Builds the fuzz targets with Clang and runs them side by side: `make fuzz SECONDS=1800`, of processor time each.

New inputs are kept in build/fuzz/<target>/corpus. They start from golden files, sessions, tokenizers and templates
made here, and from native/fuzz/corpus/<target>.tar.xz, which `run.py --keep` writes: of all inputs, the fewest and
smallest that reach the same code. Exits with 1 when a target finds something; its input lies beside the corpus.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

NATIVE = Path(__file__).resolve().parents[1]
GOLDEN = NATIVE.parent / "tests" / "formats"
TEMPLATES = NATIVE.parents[1] / "shared" / "data" / "chat-templates"
FOLDER = NATIVE.parent / "build" / "fuzz"
KEPT = NATIVE / "fuzz" / "corpus"
LONGEST, LONGEST_KEPT = 65536, 8192  # bytes of an input
FLAGS = ["-std=gnu11", "-O1", "-g1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
         "-fno-sanitize=pointer-overflow",  # NULL + 0, which C2y defines; what is read is AddressSanitizer's to judge
         "-D_GNU_SOURCE", "-DHB_X86=0", "-DHB_ARM=0", "-DHB_AVXVNNI=0", "-ffp-contract=off"]  # fmt: skip


def build(target: str) -> Path:
    """The library's scalar half and one target as a program."""
    folder = FOLDER / target
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    sources = [
        *(NATIVE / "src").glob("*.c"),
        *(NATIVE / "kernels").glob("*/*_scalar.c"),
        NATIVE / "fuzz" / f"{target}.c",
    ]
    includes = [f"-I{NATIVE / part}" for part in ("include", ".", "src")]
    program = folder / target
    newest = max(p.stat().st_mtime for p in NATIVE.rglob("*") if p.suffix in (".c", ".h", ".inc"))
    if not program.exists() or program.stat().st_mtime < newest:
        command = ["clang", *FLAGS, *includes, *map(str, sources), "-lm", "-lpthread", "-o", str(program)]
        subprocess.run(command, check=True)
    return program


def story(folder: Path) -> Path:
    """A small model, the same each time."""
    sys.path += [str(NATIVE.parent / "tests" / part) for part in ("converter", "runtime")]
    from story import story_folder

    import halfbyte

    if not (folder / "model.hb").exists():
        halfbyte.convert(story_folder(folder / "story"), folder / "model.hb", recipe="q4")
    return folder / "model.hb"


def tokenizers() -> Iterator[tuple[str, bytes]]:
    """A small section VOCB of each kind of tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from halfbyte.converter.vocabulary.compile import compile_vocabulary

    rows = {
        "bpe": (models.BPE(), normalizers.NFC(), pre_tokenizers.ByteLevel(), decoders.ByteLevel(), trainers.BpeTrainer),
        "unigram": (models.Unigram(), normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace(),
                    trainers.UnigramTrainer),
        "byte_fallback": (models.BPE(byte_fallback=True, unk_token="<unk>"), normalizers.Replace(" ", "\u2581"),
                          pre_tokenizers.Split("\u2581", "merged_with_next"), decoders.Fuse(), trainers.BpeTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(),
                      pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), trainers.WordPieceTrainer),
    }  # fmt: skip
    text = (NATIVE.parent / "README.md").read_text("utf-8").splitlines()[:60]
    for name, (model, normalizer, pre, decoder, trainer) in rows.items():
        t = Tokenizer(model)
        t.normalizer, t.pre_tokenizer, t.decoder = normalizer, pre, decoder
        options = {"unk_token": "<unk>"} if name == "unigram" else {}
        special = ["<unk>", "<s>", "</s>"]
        t.train_from_iterator(
            text, trainer(vocab_size=160, special_tokens=special, show_progress=False, **options)
        )
        yield name, compile_vocabulary(t.to_str().encode(), 1, True)


def templates() -> Iterator[tuple[str, bytes]]:
    """The sections CHAT of the templates in ../shared, where that is there."""
    from halfbyte.converter.chat.evaluate import compile_chat
    from halfbyte.formats.errors import TokenizerError

    for path in sorted(TEMPLATES.glob("*.jinja")):
        try:
            yield path.stem, compile_chat(path.read_text("utf-8"), "<s>", "</s>")
        except TokenizerError:
            continue


def seed(target: str, corpus: Path) -> dict[str, str]:
    """Writes the first inputs; what the environment of the target needs."""
    kept = KEPT / f"{target}.tar.xz"
    if kept.exists():
        with tarfile.open(kept) as archive:
            archive.extractall(corpus, filter="data")
    if target == "fuzz_open":
        for path in (*(GOLDEN / "golden").glob("*.hb"), *(GOLDEN / "golden_errors").glob("*.hb")):
            (corpus / path.name).write_bytes(path.read_bytes())
    elif target == "fuzz_session":
        from halfbyte.runtime.model import load

        model = story(corpus.parent)
        session = load(model, kv="tq3").session()
        for n in (1, 60, 20):
            session.feed(np.arange(n) % 300)
            session.save(corpus / f"{session.position}")
        return {"HB_FUZZ_MODEL": str(model)}
    elif target == "fuzz_tokenizer":
        text = "<s>Once upon a\u0301 time, I'll say 123\u4f60\u2581 !\n".encode()
        for name, section in templates():
            (corpus / name).write_bytes(struct.pack("<I", len(section)) + section + text)
        environment = {}
        for i, (name, section) in enumerate(tokenizers()):
            path = corpus.parent / f"{name}.vocb"
            path.write_bytes(section)
            environment[f"HB_FUZZ_SECTION{i}"] = str(path)
            for change in (b"", struct.pack("<IB", 40, section[20])):
                head = struct.pack("<I", 0xFFFFFFF8 + i) + change + b"\xff" * 4
                (corpus / f"{name}{len(change)}").write_bytes(head + text)
        return environment
    return {}


def fuzz(target: str, seconds: int) -> tuple[int, float]:
    """Run a target until it has had its time or finds something: its status, and the processor time it took."""
    program = build(target)
    environment = {**os.environ, **seed(target, program.parent / "corpus")}
    used = 0.0
    with (program.parent / "log").open("w") as log:
        while used < seconds:  # the clock of libFuzzer is that on the wall
            command = [program, f"-max_total_time={int(seconds - used) + 1}", f"-max_len={LONGEST}", "-timeout=300",
                       "-rss_limit_mb=4096", "-print_final_stats=1", program.parent / "corpus"]  # fmt: skip
            process = subprocess.Popen(command, env=environment, cwd=program.parent, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            used += max(1.0, usage.ru_utime + usage.ru_stime)
            if status:
                return status, used
    return 0, used


def run(seconds: int, targets: list[str]) -> int:
    """Run targets at once; 1 when one finds something."""
    failed = 0
    with ThreadPoolExecutor(len(targets)) as threads:
        for target, (status, used) in zip(targets, threads.map(lambda t: fuzz(t, seconds), targets)):
            text = (FOLDER / target / "log").read_text("utf-8", "replace")
            runs = sum(
                int(line.split()[1]) for line in text.splitlines() if "number_of_executed_units" in line
            )
            found = "clean" if status == 0 else f"FOUND SOMETHING\n{text[-4000:]}"
            print(f"{target}: {runs} runs in {used:.0f} s of processor time: {found}", flush=True)
            failed += status != 0
    return min(failed, 1)


def keep(targets: list[str]) -> int:
    """Write native/fuzz/corpus: of the inputs that the seeds do not cover, the fewest."""
    KEPT.mkdir(exist_ok=True)
    for target in targets:
        program, archive = build(target), KEPT / f"{target}.tar.xz"
        archive.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            seeds, chosen = Path(folder) / "seeds", Path(folder) / "chosen"
            seeds.mkdir(), chosen.mkdir()
            environment = {**os.environ, **seed(target, program.parent / "corpus")}
            seed(target, seeds)
            for path in seeds.iterdir():
                (chosen / path.name).write_bytes(path.read_bytes())
            command = [program, "-merge=1", f"-max_len={LONGEST_KEPT}", chosen, program.parent / "corpus"]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            files = sorted(p for p in chosen.iterdir() if not (seeds / p.name).exists())
            with tarfile.open(archive, "w:xz", preset=9) as out:
                for path in files:
                    entry = tarfile.TarInfo(path.name)
                    entry.size = path.stat().st_size
                    out.addfile(entry, io.BytesIO(path.read_bytes()))
        print(f"{archive}: {len(files)} inputs, {archive.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    everything = sorted(p.stem for p in (NATIVE / "fuzz").glob("fuzz_*.c"))
    first, *rest = sys.argv[1:]
    sys.exit(keep(rest or everything) if first == "--keep" else run(int(first), rest or everything))
