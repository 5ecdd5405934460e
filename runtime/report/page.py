"""The HTML page of a report: one file, no scripts, nothing loaded from anywhere."""

from __future__ import annotations

from pathlib import Path

from halfbyte.formats.container import File
from halfbyte.formats.proof import Proof
from halfbyte.runtime.report import groups, options, plots, rows, sources

TEMPLATE = Path(__file__).with_name("page.html")


def page(file: File, proof: Proof) -> str:
    """The page as text. Everything from the file is escaped. The same file always gives the same page."""
    from jinja2 import Environment
    from markupsafe import Markup

    found = rows(file, proof)
    columns = groups(found)
    c = proof.closeness
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=file.path.name,
        file_bytes=len(file.bytes),
        digest=file.digest.hex(),
        proof=proof,
        c=c,
        options=options(proof),
        sources=sources(proof),
        rows=found,
        exact=sum(r.error == 0 for r in found),
        legend=[(Markup(plots.key(style)), kind) for style, kind in plots.kinds(columns)],
        error_plot=Markup(plots.error_by_layer(columns)),
        bits_plot=Markup(plots.bits_by_layer(columns, proof.bits) if columns else ""),
        histogram=Markup("" if c is None else plots.kl_histogram(c)),
    )
