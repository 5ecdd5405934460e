"""The proof's schema: what is written is read back, what makes no sense is refused, bins are where the law says."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.formats import annotation, proof
from halfbyte.formats.container import File
from halfbyte.formats.errors import FormatError

GOLDEN = Path(__file__).parent / "golden" / "1.2-annotations.hb"
CLOSENESS = proof.Closeness(
    text="t.txt",
    sha256="ab" * 32,
    tokens=7,
    ctx=512,
    policy="i8g32",
    kv="f16",
    float_kv="f32",
    nll=1.2345678,
    float_nll=1.0,
    kld_mean=0.000123456789,
    kld_p99=0.5,
    kld_max=1.0,
    top1_agreement=0.75,
    kld_histogram=(0, 7) + (0,) * (proof.BINS - 2),
    ppl=3.4368997,
    float_ppl=2.7182818,
)
PROOF = proof.Proof(
    tool="halfbyte 1",
    format="1.2",
    source={"format": "gguf", "digest": "00", "files": [{"name": "m.gguf", "bytes": 3, "sha256": "cd"}]},
    recipe={"name": "q4", "method": "rtn", "smooth": True},
    bits=4.30641,
    error=0.00512345678,
    matrices=(proof.MatrixError("embed", "q4", 4.3125, 0.005),),
    closeness=CLOSENESS,
)


def test_round_trip_to_five_digits() -> None:
    data = PROOF.encode()
    got = proof.decode(annotation.decode("PROF", data))
    assert got == replace(
        PROOF,
        bits=4.3064,
        error=0.0051235,
        closeness=replace(CLOSENESS, nll=1.2346, kld_mean=0.00012346, ppl=3.4369, float_ppl=2.7183),
    )
    assert got.encode() == data
    assert "why_not" not in json.loads(data)


def test_without_closeness() -> None:
    p = replace(PROOF, closeness=None, why_not="no tokenizer")
    assert "closeness" not in json.loads(p.encode())
    assert proof.decode(json.loads(p.encode())).why_not == "no tokenizer"


def test_perplexity_may_overflow_but_not_the_section() -> None:
    p = replace(PROOF, closeness=replace(CLOSENESS, nll=1e4, ppl=math.inf))
    assert "ppl" not in json.loads(p.encode())["closeness"]
    assert proof.decode(json.loads(p.encode())).closeness == replace(
        CLOSENESS, nll=1e4, ppl=math.inf, kld_mean=0.00012346, float_ppl=2.7183
    )
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError):
            replace(PROOF, error=bad).encode()


def test_bins() -> None:
    """As SPEC.md section 13.1 says, at every edge and beyond both ends."""
    assert proof.BINS == 42
    for kld, wanted in (
        (-1e-9, 0),
        (0.0, 0),
        (9.9e-9, 0),
        (1.01e-8, 1),
        (0.99, 32),
        (1.0, 33),
        (99.9, 40),
        (1e2, 41),
    ):
        counts = proof.histogram(np.array([kld]))
        assert len(counts) == proof.BINS and counts.index(1) == wanted, kld
    rng = np.random.default_rng(1)
    kld = 10.0 ** rng.uniform(-9, 3, 5000)
    plain = [0] * proof.BINS
    for value in kld:
        plain[min(41, max(0, math.floor((math.log10(value) + 8) * 4) + 1))] += 1
    assert proof.histogram(kld) == tuple(plain)


def test_unknown_keys_are_ignored_and_golden_files_read() -> None:
    value = json.loads(PROOF.encode())
    value["later"] = 1
    again = proof.decode(value).encode()
    value["closeness"]["later"] = value["matrices"][0]["later"] = {}
    assert proof.decode(value).encode() == again
    assert proof.read(File(GOLDEN)) == proof.Proof()
    assert proof.read(File(GOLDEN.with_name("1.1-q3.hb"))) is None


def changed(path: str, new: object) -> dict[str, Any]:
    """The proof as JSON with one value replaced, or removed (None)."""
    value = json.loads(PROOF.encode())
    *parents, last = path.split(".")
    at = value
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if new is None:
        del at[last]
    else:
        at[last] = new
    return value


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("tool", 1),
        ("source", []),
        ("recipe", "q4"),
        ("bits", "4"),
        ("bits", True),
        ("error", 10**400),
        ("error", -0.1),
        ("bits", 65),
        ("closeness.top1_agreement", 1.1),
        ("closeness.tokens", 0),
        ("closeness.ctx", 1 << 70),
        ("closeness.kld_histogram", [8] * 42),
        ("matrices", {}),
        ("matrices.0.error", None),
        ("matrices.0.name", 1),
        ("matrices", [1]),
        ("closeness", 1),
        ("closeness.kld_mean", None),
        ("closeness.tokens", 1.5),
        ("closeness.kld_histogram", [1]),
        ("closeness.kld_histogram", [-1] * 42),
        ("closeness.kld_histogram", [0.5] * 42),
        ("closeness.kld_histogram", [True] * 42),
        ("why_not", 0),
    ],
)
def test_what_makes_no_sense_is_refused(path: str, new: object) -> None:
    with pytest.raises(FormatError) as caught:
        proof.decode(changed(path, new))
    assert path.split(".")[-1] in str(caught.value) or path.split(".")[0] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
