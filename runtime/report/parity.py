"""The picture of a parity result: the error of the logits at every position, and the bound."""

from __future__ import annotations

from typing import Any

from halfbyte.runtime.report.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Drawing, Scale, steps

_STYLE = (
    "<style>svg{font:12px sans-serif;background:#fff}.grid{stroke:#ddd}.tick{fill:#555}.axis{fill:#111}"
    ".mean{stroke:#b3261e;stroke-dasharray:4 3}.note{fill:#b3261e}.through{fill:none;stroke:#2563a8}</style>"
)


def picture(found: dict[str, Any]) -> str:
    """A self-contained SVG of what `runtime.parity.compare` returned."""
    errors, bound = found["logits"], found["bound"]["logits"]
    floor = min([e for e in errors if e > 0] + [bound])
    d = Drawing("Error of the logits, relative to the largest of a row, by position")
    values = steps(floor, max([*errors, bound]))
    y = Scale(values[0], values[-1], HEIGHT - BOTTOM, TOP, log=True)
    x = Scale(0, max(1, len(errors) - 1), LEFT, WIDTH - RIGHT)
    for v in values:
        d.line(LEFT, y(v), WIDTH - RIGHT, y(v), "grid")
        d.text(LEFT - 8, y(v) + 4, f"{v:.0e}", "end")
    title = f"error of the logits: {found['b']['backend']} {found['b']['policy']}"
    d.text(8, 16, f"{title} against {found['a']['backend']} {found['a']['policy']}", "start", "axis")
    d.path([(x(i), y(max(e, values[0]))) for i, e in enumerate(errors)], "through")
    d.line(LEFT, y(bound), WIDTH - RIGHT, y(bound), "mean")
    d.text(WIDTH - RIGHT, y(bound) - 6, f"bound {bound:g}", "end", "note")
    for at in (0, len(errors) // 2, len(errors) - 1):
        d.text(x(at), HEIGHT - BOTTOM + 18, str(at))
    d.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "position", cls="axis")
    namespace = '<svg xmlns="http://www.w3.org/2000/svg" '
    return d.svg().replace("<svg ", namespace, 1).replace(">", ">" + _STYLE, 1) + "\n"
