"""A sheet to draw on: text, boxes, coloured cells and dots, places in pixels.

By Pillow, which loads and draws in a quarter of the time that matplotlib takes: every merge ends
with a picture. The letters are DejaVu Sans, which comes with matplotlib.

Importing matplotlib took 0.29 s and drawing 0.42, half of it ticks; this takes 0.14.
"""

import functools
import importlib.util
import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..maths.lazy import np

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Dots are drawn so much larger, and made smaller: round, without steps.
_FINER = 8

Colour = tuple[int, int, int] | str
# Left, top, right, bottom.
Box = tuple[float, float, float, float]


class Sheet:
    """A white picture.

    Args:
        width, height: in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self._image)

    def text(
        self,
        at: tuple[float, float],
        text: str,
        size: float,
        colour: Colour,
        anchor: str,
        *,
        bold: bool = False,
    ) -> None:
        """Write a line of text.

        Args:
            at: x and y of its anchor.
            text: one line.
            size: height of the letters, in pixels.
            colour: as Pillow takes it.
            anchor: Pillow's, as ``ls``: left end of the line that the letters stand on.
            bold: whether in heavy letters.
        """
        self._draw.text(at, text, fill=colour, font=_font(size, bold), anchor=anchor)

    def fill(self, box: Box, colour: Colour) -> None:
        """Paint a box."""
        left, top, right, bottom = map(math.floor, box)
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def frame(self, box: Box, colour: Colour) -> None:
        """Draw the edges of a box."""
        self._draw.rectangle([*map(math.floor, box)], outline=colour)

    def cells(self, box: Box, colours: Any) -> None:
        """Fill a box with a grid of colours.

        Args:
            box: where.
            colours: uint8, shape (rows, columns, 3).
        """
        from PIL import Image

        left, top, right, bottom = map(math.floor, box)
        grid = Image.fromarray(colours).resize(
            (right - left, bottom - top), Image.Resampling.NEAREST
        )
        self._image.paste(grid, (left, top))

    def dots(
        self, places: Iterable[tuple[float, float]], diameter: int, colour: Colour, opacity: float
    ) -> None:
        """Draw dots, those behind shining through.

        Args:
            places: x and y of each.
            diameter: in pixels.
            colour: as Pillow takes it.
            opacity: from 0 to 1.
        """
        from PIL import Image, ImageDraw

        large = Image.new("L", (diameter * _FINER, diameter * _FINER))
        edge = diameter * _FINER - 1
        ImageDraw.Draw(large).ellipse((0, 0, edge, edge), fill=round(255 * opacity))
        stamp = large.resize((diameter, diameter), Image.Resampling.BOX)
        for x, y in places:
            self._image.paste(colour, (round(x - diameter / 2), round(y - diameter / 2)), stamp)

    def png(self) -> bytes:
        """Return the picture as PNG; the same picture gives the same bytes."""
        buffer = BytesIO()
        self._image.save(buffer, "PNG")
        return buffer.getvalue()


@functools.cache
def _font(size: float, bold: bool) -> "FreeTypeFont":
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")  # where it lies; nothing of it is imported
    if found is None or found.origin is None:
        return ImageFont.load_default(size)  # type: ignore[return-value]
    letters = Path(found.origin).parent / "mpl-data/fonts/ttf"
    return ImageFont.truetype(letters / f"DejaVuSans{'-Bold' * bold}.ttf", size)


def painted(values: Any, low: float, high: float, scale: Sequence[str], blank: str) -> Any:
    """Return the colours of numbers.

    Args:
        values: float64, any shape; what is not finite is left blank.
        low, high: the numbers of the scale's first and last colour.
        scale: colours at equal steps, as ``#rrggbb``.
        blank: the colour of what has no number.

    Returns:
        uint8, one more axis of 3.
    """
    steps = np.array([_rgb(colour) for colour in scale], float)
    shown = np.isfinite(values)
    share = (np.where(shown, values, low) - low) / (high - low if high > low else 1)
    place = np.clip(share, 0, 1) * (len(steps) - 1)
    at = np.arange(len(steps))
    colours = np.stack([np.interp(place, at, steps[:, c]) for c in range(3)], axis=-1)
    colours[~shown] = _rgb(blank)
    return np.rint(colours).astype(np.uint8)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
