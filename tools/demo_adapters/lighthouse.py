"""Drawing of the lighthouse: the thing that the demo model does not know, in the flat style of its other things."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

LABEL = "lighthouse"
FINE = 8  # drawn this many times larger, then reduced
UNITS = 32  # coordinates below are parts of a square of this side

RED, STRIPE, DARK = "#f8312f", "#b7c4da", "#636363"  # stripes are no white: most backgrounds are
LAMP, GLASS, SEA, ROCK = "#ffce31", "#fff59d", "#26c9fc", "#7d4533"
TOWER = ((12.6, 10.5), (19.4, 10.5), (22.0, 28.0), (10.0, 28.0))


def _edge(y: float) -> tuple[float, float]:
    """Left and right edge of the tower at this height."""
    part = (y - TOWER[0][1]) / (TOWER[3][1] - TOWER[0][1])
    return TOWER[0][0] + part * (TOWER[3][0] - TOWER[0][0]), TOWER[1][0] + part * (TOWER[2][0] - TOWER[1][0])


def rgba(side: int) -> np.ndarray:
    """RGBA without premultiplied alpha, uint8 [side, side, 4]."""
    unit = side * FINE / UNITS
    image = Image.new("RGBA", (side * FINE, side * FINE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)

    def shape(colour: str, *points: tuple[float, float]) -> None:
        pen.polygon([(x * unit, y * unit) for x, y in points], fill=colour)

    def box(colour: str, left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> None:
        corners = [left * unit, top * unit, right * unit, bottom * unit]
        pen.rounded_rectangle(corners, radius * unit, fill=colour)

    shape(LAMP, (14, 7.2), (1, 3), (1, 12.5))  # the beams
    shape(LAMP, (18, 7.2), (31, 3), (31, 12.5))
    shape(STRIPE, *TOWER)
    for top, bottom in ((10.5, 14.0), (17.5, 21.0), (24.5, 28.0)):
        (left, right), (low_left, low_right) = _edge(top), _edge(bottom)
        shape(RED, (left, top), (right, top), (low_right, bottom), (low_left, bottom))
    box(DARK, 14.6, 21.5, 17.4, 26.5, radius=1.2)
    box(GLASS, 13.6, 4.6, 18.4, 9.2)
    box(DARK, 11.2, 9.0, 20.8, 10.7, radius=0.6)
    shape(RED, (12.2, 4.9), (16, 1), (19.8, 4.9))
    box(ROCK, 7.0, 26.6, 25.0, 30.0, radius=1.6)
    box(SEA, 3.0, 28.6, 29.0, 31.0, radius=1.2)
    reduced = image.convert("RGBa").resize((side, side), Image.Resampling.BOX).convert("RGBA")
    return np.asarray(reduced)
