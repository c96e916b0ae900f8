"""What was measured over a long run, as a picture: one small chart for each quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

WIDTH, HEIGHT, GAP, LEFT = 640, 90, 34, 70
COLORS = ("#1f77b4", "#d62728", "#2ca02c")
NUM_POINTS = 200

Curves = Mapping[str, Mapping[str, Sequence[float]]]
"""By quantity, and by process: one value for each update."""


def to_svg(curves: Curves, title: str) -> str:
    """A picture as text; every chart begins at 0, so that what is flat looks flat."""
    height = GAP + len(curves) * (HEIGHT + GAP)
    charts = [
        _chart(quantity, of_process, GAP + number * (HEIGHT + GAP))
        for number, (quantity, of_process) in enumerate(curves.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LEFT + 20}" '
            f'height="{height}" font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{LEFT}" y="16" font-weight="bold">{title}</text>',
            *charts,
            "</svg>",
            "",
        ]
    )


def _chart(quantity: str, of_process: Mapping[str, Sequence[float]], top: int) -> str:
    thinned = {name: _thin(values) for name, values in of_process.items()}
    highest = max(max(values) for values in thinned.values()) * 1.1 or 1.0
    lines = [
        f'<text x="{LEFT}" y="{top + 12}">{quantity}</text>',
        f'<text x="{LEFT - 6}" y="{top + 24}" text-anchor="end">{highest:.0f}</text>',
        f'<text x="{LEFT - 6}" y="{top + HEIGHT}" text-anchor="end">0</text>',
        f'<path d="M{LEFT},{top + 16} V{top + HEIGHT} H{LEFT + WIDTH}" fill="none" stroke="#999"/>',
    ]
    for color, (name, values) in zip(COLORS, thinned.items(), strict=False):
        step = WIDTH / max(1, len(values) - 1)
        points = " ".join(
            f"{LEFT + number * step:.1f},{top + HEIGHT - value / highest * (HEIGHT - 16):.1f}"
            for number, value in enumerate(values)
        )
        place = LEFT + 180 + 110 * list(thinned).index(name)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        lines.append(f'<text x="{place}" y="{top + 12}" fill="{color}">{name}</text>')
    return "\n".join(lines)


def _thin(values: Sequence[float]) -> list[float]:
    """Medians of runs of values, so that one slow update does not hide the rest."""
    size = max(1, len(values) // NUM_POINTS)
    return [median(values[start : start + size]) for start in range(0, len(values), size)]
