"""Writes golden/*.hb and golden.json: a one-layer model that uses every op of a version, in each encoding it added.

Files of a released format version are never written again: later versions must still open them.
`python tests/formats/make_golden.py --new-version` adds files for a version that has none yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from halfbyte.formats import program
from halfbyte.formats.annotation import encode, rewrite_section
from halfbyte.formats.container import VERSION, File
from halfbyte.formats.encodings import BY_NAME, K256, MATRIX_ENCODINGS
from halfbyte.formats.ops import FUNCTIONS
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.kv import KV

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ops"))
from programs import Tiny, code_matrix, float_tensor

GOLDEN = Path(__file__).resolve().parent / "golden"
RECORD = GOLDEN / "golden.json"
HIDDEN, HEAD, KV_HEADS, SHARE, FFN, VOCAB = 16, 8, 1, 2, 8, 16
# (group, scale type) of the encodings that let the tensor choose
CHOICES = {
    "i8": (0, "f32"), "i4": (8, "f16"), "a8": (4, "bf16"), "a4": (32, "f16"), "z8": (16, "bf16"), "z4": (8, "f16"),
    "i2": (16, "f16"), "i3": (0, "bf16"), "i5": (8, "f16"), "i6": (4, "f32"), "a2": (16, "f16"), "a5": (32, "f16"),
    "z2": (32, "f32"), "z3": (8, "f16"), "n4": (32, "f16"), "m4": (32, "bf16"), "f8e4m3": (0, "f32"),
    "f8e5m2": (32, "f16"),
}  # fmt: skip
TWO_LEVEL = {"i3": 16, "i6": 16, "n4": 32, "a2": 16, "a4": 32}  # encodings of ggml's K-quants -> group
ANNOTATIONS = {"PROF": {"b": [1, 2.5, None], "a": "\u00bd"}, "KVMD": {"modes": {}}}
PROMPT = ([1, 5, 2, 15, 0], [0, 1, 2, 3, 4])


def build(encoding: str, seed: int, two_level: bool = False) -> Tiny:
    """One layer: norms, merged qkv with bias, partial rotation, grouped attention in a window, GLU.

    From version 1.1 on also a rotation and a permutation of columns, and a matrix with tails.
    """
    t = Tiny(seed)
    minor = 1 if two_level else BY_NAME[encoding].minor

    def matrix(name: str, rows: int, cols: int) -> int:
        if encoding in ("f32", "f16", "bf16"):
            return t.tensor(float_tensor(name, t.rng.normal(0, 0.3, (rows, cols)).astype("f4"), encoding))
        group, scale = (TWO_LEVEL[encoding], K256) if two_level else CHOICES.get(encoding, (0, ""))
        return t.tensor(code_matrix(name, encoding, rows, cols, t.rng, group, scale))

    def vector(name: str, values: np.ndarray) -> int:
        return t.tensor(float_tensor(name, values.astype("f4")))

    q, k = HEAD * KV_HEADS * SHARE, HEAD * KV_HEADS
    embedding = matrix("embed", VOCAB, HIDDEN)
    qkv_matrix, qkv_bias = matrix("qkv", q + 2 * k, HIDDEN), vector("qkv.bias", t.rng.normal(size=q + 2 * k))
    out_matrix, up_matrix = matrix("out", HIDDEN, q), matrix("gate_up", 2 * FFN, HIDDEN)
    down_matrix = matrix("down", HIDDEN, FFN)
    norm = vector("norm", t.rng.normal(1, 0.1, HIDDEN))
    shift = vector("norm.bias", t.rng.normal(0, 0.1, HIDDEN))
    inv_freq = vector("inv_freq", 100.0 ** -(np.arange(3) / 3))
    t.caches.append((KV_HEADS, HEAD, HEAD, 3))

    x, h, qkv = t.slot(HIDDEN), t.slot(HIDDEN), t.slot(q + 2 * k)
    t.emit("embed", [x], [], (embedding,))
    t.emit("rmsnorm", [h], [x], (norm,), eps=1e-5, dim=HIDDEN)
    if minor >= 1:
        matrix("wide", 16, 257 if two_level else 72)
        t.emit("hadamard", [h], [h], dim=HIDDEN)
        normed, h = h, t.slot(HIDDEN)
        t.emit("gather", [h], [normed], (t.index(t.rng.permutation(HIDDEN)),))
    t.emit("linear", [qkv], [h], (qkv_matrix, qkv_bias))
    qs, ks, vs = t.view(qkv, 0, q), t.view(qkv, q, k), t.view(qkv, q + k, k)
    for s in (qs, ks):
        t.emit("rope", [s], [s], (inv_freq,), head_dim=HEAD, mscale=1.0)
    t.emit("kv_put", [], [ks, vs], cache=0)
    attended, gate_up, inner = t.slot(q), t.slot(2 * FFN), t.slot(FFN)
    t.emit("attend", [attended], [qs], cache=0, scale=HEAD**-0.5, softcap=20.0)
    t.emit("linear", [h], [attended], (out_matrix, None))
    t.emit("add", [x], [x, h], scale=0.5)
    t.emit("layernorm", [h], [x], (norm, shift), eps=1e-6, dim=HIDDEN)
    t.emit("linear", [gate_up], [h], (up_matrix, None))
    t.emit("glu", [inner], [gate_up], function=FUNCTIONS["silu"])
    t.emit("mul", [inner], [inner, inner])
    t.emit("linear", [h], [inner], (down_matrix, None))
    t.emit("add", [x], [x, h], scale=1.0)
    last, logits = t.slot(HIDDEN, program.PICKS), t.slot(VOCAB, program.PICKS)
    t.emit("pick", [last], [x])
    t.emit("linear", [logits], [last], (embedding, None))
    t.emit("unary", [logits], [logits], function=FUNCTIONS["softcap"], p=30.0)
    return t


META = {
    "general.name": "golden",
    "general.parameters": 1000,
    "golden.bytes": b"\x00\x01\xff",
    "model.layers": 1,
    "model.context_length": 64,
    "tokenizer.eos_ids": [2, 3],
    "tokenizer.add_bos": True,
    "generation.temperature": 0.5,
}


def logits(file: File, policy: str, mode: str) -> np.ndarray:
    """float32[5, VOCAB]: logits of every position of PROMPT on the reference."""
    kv = KV(file.caches, mode)
    ids, positions = (np.array(v, np.int32) for v in PROMPT)
    step = Step(ids, positions, np.zeros(5, np.int32), np.arange(5, dtype=np.int32), [kv])
    return Reference(file, policy).run(step)


def describe(path: Path) -> dict:
    """What golden.json keeps of a file."""
    file = File(path)
    file.verify()
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "values": {t.name: hashlib.sha256(file.dequantize(t).tobytes()).hexdigest() for t in file.tensors},
        "logits": {
            f"{policy}/{mode}": [[float(v) for v in row] for row in logits(file, policy, mode)]
            for policy, mode in (("f32", "f32"), ("i8g32", "f16"))
        },
    }


def main() -> None:
    """Write the files of the current format version, once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-version", action="store_true", help="add files for a version that has none")
    arguments = parser.parse_args()
    version = ".".join(map(str, VERSION))
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record and not arguments.new_version:
        sys.exit("golden files exist and are kept for ever; a new format version is added with --new-version")
    if any(name.startswith(f"{version}-") for name in record):
        sys.exit(f"golden files of format {version} exist; raise container.VERSION first")
    GOLDEN.mkdir(exist_ok=True)
    new: list[tuple[str, bool]] = [(e.name, False) for e in MATRIX_ENCODINGS if e.minor == VERSION[1]]
    if VERSION == (1, 1):
        new += [(name, True) for name in TWO_LEVEL]
    for seed, (name, two_level) in enumerate(new):
        path = GOLDEN / f"{version}-{name}{'.k256' if two_level else ''}.hb"
        build(name, seed, two_level).write(path, META, b'{"model":"golden"}', "{{ messages }}")
        record[path.name] = describe(path)
    if VERSION == (1, 2):
        path = GOLDEN / f"{version}-annotations.hb"
        build("q4", 0).write(path, META, b'{"model":"golden"}', "{{ messages }}")
        for kind, value in ANNOTATIONS.items():
            rewrite_section(path, kind, encode(value))
        record[path.name] = describe(path)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
