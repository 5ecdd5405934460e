"""`halfbyte report`: the figures of the proof on the terminal, as JSON and on a page that needs nothing else."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from small_model import fails, quiet, write_checkpoint

import halfbyte
from halfbyte.formats import annotation, proof
from halfbyte.formats.container import File
from halfbyte.runtime.report import groups, plots, rows

HOSTILE = '<script>alert("1")</script>&\'{{ 7 * 7 }}\x1b[31m'


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return halfbyte.convert(write_checkpoint(folder / "m"), folder / "m.hb", method="rtn")


def proof_of(path: Path) -> proof.Proof:
    found = proof.read(File(path))
    assert found is not None
    return found


def with_proof(file: Path, copy: Path, section: bytes | None) -> Path:
    """A copy of a file with another proof."""
    copy.write_bytes(file.read_bytes())
    annotation.rewrite_section(copy, "PROF", section)
    return copy


class Page(HTMLParser):
    """Tags with attributes, and the text, of a page whose elements must all be closed in order."""

    VOID = ("meta", "br", "link", "img", "line")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """All words with single spaces."""
        return " ".join(" ".join(self.words).split())


def page_of(capsys: Any, path: Path, out: Path) -> str:
    printed = quiet(capsys, "report", path, "--html", out)
    assert printed.startswith(f"{out}: ") and printed.count("\n") == 1
    return out.read_text(encoding="utf-8")


def test_terminal(file: Path, capsys: Any) -> None:
    p = proof_of(file)
    c = p.closeness
    assert c is not None
    out = quiet(capsys, "report", file)
    for figure in (c.kld_mean, c.kld_p99, c.kld_max, c.ppl, c.float_ppl, c.nll, c.float_nll):
        assert f"{figure:.5g}" in out
    for word in (
        f"{c.top1_agreement:.2%}",
        c.sha256,
        p.source["digest"],
        f"{c.tokens} tokens",
        "rtn",
        p.tool,
    ):
        assert word in out
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    layers = [line.split()[0] for line in lines[start + 1 :] if line]
    assert layers == ["embed", "0", "1", "2", "lm_head", "error:"]
    out = quiet(capsys, "report", file, "--matrices")
    for m in p.matrices:
        assert re.search(rf"^{m.name} +{m.encoding} +{m.bits:.3f} +{m.error:.4g}$", out, re.MULTILINE)


def test_means_of_layers_weigh_by_size(file: Path) -> None:
    f, p = File(file), proof_of(file)
    found = {g.label: g for g in groups(rows(f, p))}
    sizes = {t.name: math.prod(t.shape) for t in f.tensors}
    mine = [m for m in p.matrices if m.name.startswith("layers.1.")]
    total = sum(sizes[m.name] for m in mine)
    assert len(mine) == 4 and found["1"].worst.error == max(m.error for m in mine)
    assert found["1"].error == pytest.approx(sum(m.error * sizes[m.name] for m in mine) / total)
    assert found["1"].bits == pytest.approx(sum(m.bits * sizes[m.name] for m in mine) / total)


def test_json(file: Path, capsys: Any) -> None:
    got = json.loads(quiet(capsys, "report", file, "--json"))
    section = json.loads(File(file).section("PROF"))
    assert got["closeness"] == section["closeness"] and got["matrices"] == section["matrices"]
    assert got["digest"] == File(file).digest.hex() and got["file_bytes"] == file.stat().st_size


def test_page(file: Path, tmp_path: Path, capsys: Any) -> None:
    text = page_of(capsys, file, tmp_path / "o.html")
    p = Page(text)
    c = proof_of(file).closeness
    assert c is not None
    for figure in (f"{c.kld_mean:.4g}", f"{c.kld_p99:.4g}", f"{100 * c.top1_agreement:.2f} %", c.sha256):
        assert figure in p.text
    labels = [a.get("aria-label") or "" for tag, a in p.tags if tag == "svg" and a.get("role") == "img"]
    assert len(labels) == 3 and "Histogram" in labels[0] and "error" in labels[1] and "Bits" in labels[2]
    for m in proof_of(file).matrices:
        assert f"{m.name}: {m.encoding}, {m.bits:.3f} bits per weight, error {m.error:.4g}" in p.text
    filled = [n for n in c.kld_histogram if n]
    assert len(re.findall(r"nats: \d+ tokens", text)) == len(filled)
    assert "prefers-color-scheme: dark" in text
    assert text == page_of(capsys, file, tmp_path / "o.html")
    assert [f.name for f in tmp_path.iterdir()] == ["o.html"]


def test_page_needs_nothing_else(file: Path, tmp_path: Path, capsys: Any) -> None:
    text = page_of(capsys, file, tmp_path / "o.html")
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "use", "image"), tag
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|url\(|@import", text)


def test_text_from_the_file_is_escaped(file: Path, tmp_path: Path, capsys: Any) -> None:
    p = proof_of(file)
    assert p.closeness is not None
    hostile = replace(
        p,
        tool=HOSTILE,
        recipe={"name": HOSTILE, HOSTILE: {"name": HOSTILE, "sha256": HOSTILE}, "a": [HOSTILE]},
        source={"format": HOSTILE, "digest": 7, "files": [{"name": HOSTILE}, 3]},
        matrices=[replace(m, encoding=HOSTILE) for m in p.matrices],
        closeness=replace(p.closeness, text=HOSTILE, policy=HOSTILE),
    )
    path = with_proof(file, tmp_path / "<b>&.hb", hostile.encode())
    text = page_of(capsys, path, tmp_path / "o.html")
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "b") and tag != "b"]
    assert "<script" not in text and "<b>&" not in text and "{{ 7 * 7 }}" in page.text
    assert "\x1b" not in quiet(capsys, "report", path) + quiet(capsys, "info", path)


def test_no_proof_and_damaged_ones(file: Path, tmp_path: Path, capsys: Any) -> None:
    bare = with_proof(file, tmp_path / "bare.hb", None)
    assert "has no proof in it" in fails(capsys, "report", bare)
    assert fails(capsys, "report", bare, "--html", tmp_path / "o.html")
    for section in (b"[]", b'{"bits":"4"}', b'{"closeness":{}}'):
        damaged = with_proof(file, tmp_path / "d.hb", section)
        assert "section PROF" in fails(capsys, "report", damaged)
        assert re.search(r"^proof +section PROF", quiet(capsys, "info", damaged), re.MULTILINE)
    assert re.search(r"^proof +none$", quiet(capsys, "info", bare), re.MULTILINE)
    assert not (tmp_path / "o.html").exists()


def test_little_to_show(file: Path, tmp_path: Path, capsys: Any) -> None:
    """An empty proof, one of another model, one that was not measured, and exact matrices."""
    p = proof_of(file)
    exact = replace(p, matrices=[replace(m, error=0.0) for m in p.matrices])
    for value in (
        proof.Proof(),
        replace(p, matrices=[proof.MatrixError("elsewhere", "q4", 4.0, 0.1)]),
        replace(p, closeness=None, why_not="no tokenizer here"),
        exact,
        replace(p, matrices=[replace(m, bits=0.0) for m in p.matrices], bits=0.0),
        replace(p, matrices=[replace(m, bits=64.0, error=10.0**-i) for i, m in enumerate(p.matrices)]),
        replace(p, matrices=[replace(m, error=1e308 if i else 1e-308) for i, m in enumerate(p.matrices)]),
    ):
        path = with_proof(file, tmp_path / "m.hb", value.encode())
        page = Page(page_of(capsys, path, tmp_path / "o.html"))
        assert value.why_not in page.text and value.why_not in quiet(capsys, "report", path)
        assert ("Every matrix is stored exactly." in page.text) == (value == exact)
        assert "nan" not in page.text.lower()


def test_the_page_goes_nowhere_else(file: Path, tmp_path: Path, capsys: Any) -> None:
    before = file.read_bytes()
    fails(capsys, "report", file, "--html", file)
    fails(capsys, "report", file, "--html", tmp_path / "absent" / "o.html")
    fails(capsys, "report", file, "--html", tmp_path)
    assert file.read_bytes() == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("low", "high"), [(0.004, 0.006), (1e-5, 0.08), (3e-4, 3e-4), (1e-300, 1e-3), (0.0007, 0.09)]
)
def test_error_axis_encloses_what_it_shows(low: float, high: float) -> None:
    values = plots.steps(low, high)
    assert values[0] <= low * (1 + 1e-6) and values[-1] >= high * (1 - 1e-6) and 2 <= len(values) <= 10
    assert values == sorted(set(values))


@pytest.mark.parametrize("high", [0.3, 1, 4.25, 6.28, 16, 32, 100])
def test_axis_from_zero(high: float) -> None:
    values = plots.ticks(high)
    assert values[0] == 0 and values[-1] >= high * (1 - 1e-9) and 3 <= len(values) <= 9
