"""The three plots of a report as inline SVG: error by layer, bits by layer, histogram of the KL divergence.

Colours are CSS variables of the page (--s1 ... for series, --ink, --muted, --grid), so that one drawing serves
light and dark. Every mark carries a <title>, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from halfbyte.formats import proof
from halfbyte.runtime.report import Group, Row

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 44  # around the plotting area
SERIES = 6  # kinds of matrices with a colour and a shape of their own
LABELS = 24  # on a layer axis, at most


class Drawing:
    """Marks in the coordinates of a viewBox."""

    def __init__(self, label: str):
        self.label, self.parts = label, list[str]()

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        """A straight line."""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "middle", cls: str = "tick") -> None:
        """Text whose baseline is at y."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}">{escape(text)}</text>'
        )

    def bar(self, x: float, y: float, width: float, height: float, title: str, cls: str) -> None:
        """A bar with rounded upper corners, down to y + height."""
        r = min(3.0, width / 2, height)
        path = (
            f"M{x:.1f} {y + height:.1f}v{r - height:.1f}q0 {-r:.1f} {r:.1f} {-r:.1f}h{width - 2 * r:.1f}"
            f"q{r:.1f} 0 {r:.1f} {r:.1f}v{height - r:.1f}z"
        )
        self.parts.append(f'<path d="{path}" class="{cls}"><title>{escape(title)}</title></path>')

    def path(self, points: Sequence[tuple[float, float]], cls: str) -> None:
        """Lines through points."""
        self.parts.append(f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" class="{cls}"/>')

    def mark(self, x: float, y: float, shape: int, title: str, cls: str) -> None:
        """One of SERIES shapes."""
        outline = (
            "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
            "M-3.6 -3.6h7.2v7.2h-7.2z",
            "M0 -5l5 5l-5 5l-5 -5z",
            "M0 -4.8l4.8 8.4h-9.6z",
            "M0 4.8l4.8 -8.4h-9.6z",
            "M-5 -1.7h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z",
        )[shape % SERIES]
        self.parts.append(
            f'<path d="{outline}" transform="translate({x:.1f} {y:.1f})" class="{cls}">'
            f"<title>{escape(title)}</title></path>"
        )

    def svg(self) -> str:
        """The element."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.label)}">'
            + "".join(self.parts)
            + "</svg>"
        )


class Scale:
    """From values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self.log, self.start, self.end = log, start, end
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def steps(low: float, high: float) -> list[float]:
    """Values of the form 1, 2 or 5 times a power of ten that enclose low..high, both positive."""
    every = [m * 10.0**e for e in range(-320, 300) for m in (1, 2, 5) if m * 10.0**e > 1e-307]
    below = max((v for v in every if v <= low * (1 + 1e-9)), default=every[0])
    above = min((v for v in every if v >= high * (1 - 1e-9) and v > below), default=every[-1])
    found = [v for v in every if below <= v <= above]
    if len(found) <= 8:
        return found
    decades = range(math.floor(math.log10(below) + 1e-9), math.ceil(math.log10(above) - 1e-9) + 1)
    every_n = math.ceil((len(decades) - 1) / 8)
    return [10.0**e for e in range(decades[0], decades[-1] + every_n, every_n)]


def ticks(high: float) -> list[float]:
    """0, step, ... up to at least high; some four to eight of them."""
    step = next(s for e in range(-2, 12) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if high / s <= 7)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _short(value: float) -> str:
    return (
        f"{value:g}"
        if not value or 1e-3 <= value < 1e5
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


def _frame(d: Drawing, y: Scale, values: Iterable[float], title: str) -> None:
    """Horizontal grid with its labels; the title of the axis above it."""
    for v in values:
        d.line(LEFT, y(v), WIDTH - RIGHT, y(v), "grid")
        d.text(LEFT - 8, y(v) + 4, _short(v), "end")
    d.text(8, 16, title, "start", "axis")


def _layers(d: Drawing, columns: Sequence[Group]) -> list[float]:
    """The x axis of a plot by layer; the middles of its columns."""
    width = (WIDTH - LEFT - RIGHT) / len(columns)
    middles = [LEFT + (i + 0.5) * width for i in range(len(columns))]
    every = math.ceil(len(columns) / LABELS)
    for x, g in zip(middles, columns):
        number = g.rows[0].layer
        if number is None or number % every == 0:
            label = g.label if number is not None or len(g.label) < 10 else f"{g.label[:8]}…"
            d.text(x, HEIGHT - BOTTOM + 18, label)
    d.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "layer", cls="axis")
    return middles


def _matrix(r: Row) -> str:
    return f"{r.name}: {r.encoding}, {r.bits:.3f} bits per weight, error {r.error:.4g}"


def error_by_layer(columns: Sequence[Group]) -> str:
    """Relative squared error of every matrix over its layer, logarithmic; '' where all are exact."""
    found = [r.error for g in columns for r in g.rows if r.error > 0]
    if not found:
        return ""
    d = Drawing("Relative squared error of every matrix, by layer")
    values = steps(min(found), max(found))
    y = Scale(values[0], values[-1], HEIGHT - BOTTOM, TOP, log=True)
    _frame(d, y, values, "relative squared error")
    middles = _layers(d, columns)
    kinds = list(dict.fromkeys(r.kind for g in columns for r in g.rows if r.layer is not None))
    points: dict[str, list[tuple[float, float, Row]]] = {}
    for x, g in zip(middles, columns):
        for r in g.rows:
            if r.error > 0:
                points.setdefault(r.kind if r.layer is not None else "", []).append((x, y(r.error), r))
    for k, kind in enumerate(kinds):
        style = f"s{k + 1}" if k < SERIES else "other"
        if kind in points and k < SERIES:
            d.path([(x, v) for x, v, _ in points[kind]], f"through {style}")
    for k, kind in enumerate(["", *kinds]):
        style = "other" if not k or k > SERIES else f"s{k}"
        for x, v, r in points.get(kind, ()):
            d.mark(x, v, max(0, k - 1), _matrix(r), f"mark {style}")
    return d.svg()


def kinds(columns: Sequence[Group]) -> list[tuple[str, str]]:
    """The legend of `error_by_layer`: (class, kind) of the series in order, what is over as one."""
    names = list(dict.fromkeys(r.kind for g in columns for r in g.rows if r.layer is not None))
    out = [(f"s{i + 1}", n) for i, n in enumerate(names[:SERIES])]
    others = len(names) > SERIES or any(r.layer is None for g in columns for r in g.rows)
    return out + ([("other", "others" if len(names) > SERIES else "outside the layers")] if others else [])


def key(style: str) -> str:
    """A small mark for a legend."""
    d = Drawing("")
    d.mark(8, 8, int(style[1:]) - 1 if style[1:].isdigit() else 0, "", f"mark {style}")
    return f'<svg viewBox="0 0 16 16" class="key" aria-hidden="true">{"".join(d.parts)}</svg>'


def bits_by_layer(columns: Sequence[Group], mean: float) -> str:
    """Mean bits per weight of every layer as bars, and of the whole file as a line."""
    d = Drawing("Bits per weight, by layer")
    values = ticks(max([mean, *(g.bits for g in columns)]) or 1.0)
    y = Scale(0, values[-1], HEIGHT - BOTTOM, TOP)
    _frame(d, y, values, "bits per weight")
    width = (WIDTH - LEFT - RIGHT) / len(columns)
    bar = min(40.0, max(2.0, width - 2 if width < 12 else width * 0.7))
    for x, g in zip(_layers(d, columns), columns):
        where = f"layer {g.label}" if g.rows[0].layer is not None else g.label
        title = "\n".join([f"{where}: {g.bits:.3f} bits per weight", *map(_matrix, g.rows)])
        d.bar(
            x - bar / 2,
            y(g.bits),
            bar,
            y(0) - y(g.bits),
            title,
            "bar s1" if g.rows[0].layer is not None else "bar other",
        )
    d.line(LEFT, y(mean), WIDTH - RIGHT, y(mean), "mean")
    d.text(WIDTH - RIGHT, y(mean) - 6, f"all {mean:.3f}", "end", "note")
    return d.svg()


def kl_histogram(c: proof.Closeness) -> str:
    """How many tokens have which KL divergence, in bins of a quarter of a decade; '' where it was not kept."""
    filled = [i for i, n in enumerate(c.kld_histogram) if n]
    if not filled:
        return ""
    d = Drawing("Histogram of the KL divergence of every token")
    first, last = max(0, filled[0] - 1), min(proof.BINS - 1, filled[-1] + 1)
    share = 100 / sum(c.kld_histogram)
    values = ticks(max(c.kld_histogram) * share)
    y = Scale(0, values[-1], HEIGHT - BOTTOM, TOP)
    _frame(d, y, values, "% of the tokens")
    width = (WIDTH - LEFT - RIGHT) / (last - first + 1)

    def x(edge: float) -> float:  # edge k lies between bins k and k + 1
        return LEFT + (edge + 1 - first) * width

    edges = proof.edges()
    for i in range(first, last + 1):
        n = c.kld_histogram[i]
        low = f"{edges[i - 1]:.2g}" if i else "0"
        span = f"{low} to {edges[i]:.2g}" if i < proof.BINS - 1 else f"{low} or more"
        if n:
            d.bar(x(i - 1) + 1, y(n * share), max(1.0, width - 2), y(0) - y(n * share),
                  f"{span} nats: {n} tokens, {n * share:.2g} %", "bar s1")  # fmt: skip
    for k in range(proof.HIGHEST - proof.LOWEST + 1):
        edge = k * proof.PER_DECADE
        if first - 1 <= edge <= last:
            d.line(x(edge), y(0), x(edge), y(0) + 4, "tickmark")
            d.text(x(edge), HEIGHT - BOTTOM + 18, _short(10.0 ** (k + proof.LOWEST)))
    for value, name in ((c.kld_mean, "mean"), (c.kld_p99, "99 % below")):
        if value > 0:
            at = (math.log10(value) - proof.LOWEST) * proof.PER_DECADE
            if first - 1 <= at <= last:
                d.line(x(at), TOP - 4, x(at), y(0), "mean")
                d.text(x(at), TOP - 8, f"{name} {value:.3g}", "end" if name == "mean" else "start", "note")
    d.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "KL divergence, nats a token", cls="axis")
    return d.svg()
