"""Side by side: what bicubic interpolation makes of a picture and what a network makes of it."""

from __future__ import annotations

from typing import Any

MARGIN, LABEL = 12, 34


def side_by_side(small: Any, large: Any, zoom: tuple[int, int, int, int] | None = None, name: str = "fastsr") -> Any:
    """A labelled picture: `small` enlarged by bicubic interpolation to the size of `large`, beside `large`.

    Args:
        small: the PIL image that went in.
        large: the PIL image that came out.
        zoom: a box (left, top, right, bottom) in pixels of `large` that is shown again below, as wide as the pictures above.
        name: the label of `large`.
    """
    from PIL import Image, ImageDraw, ImageFont

    pairs = [(small.convert("RGB").resize(large.size, Image.Resampling.BICUBIC), large.convert("RGB"))]
    width, heights = large.width, [large.height]
    if zoom is not None:
        height = round((zoom[3] - zoom[1]) * width / (zoom[2] - zoom[0]))
        pairs.append(tuple(p.crop(zoom).resize((width, height), Image.Resampling.LANCZOS) for p in pairs[0]))  # type: ignore[arg-type]
        heights.append(height)
    sheet = Image.new("RGB", (2 * width + 3 * MARGIN, LABEL + sum(heights) + (1 + len(heights)) * MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=22)
    for column, label in enumerate((f"bicubic x{large.width // small.width}", f"{name} x{large.width // small.width}")):
        draw.text((MARGIN + column * (width + MARGIN), MARGIN // 2), label, fill="black", font=font)
    top = LABEL + MARGIN
    for pair, height in zip(pairs, heights, strict=True):
        for column, picture in enumerate(pair):
            sheet.paste(picture, (MARGIN + column * (width + MARGIN), top))
        top += height + MARGIN
    if zoom is not None:
        for column in range(2):
            left = MARGIN + column * (width + MARGIN)
            draw.rectangle((left + zoom[0], LABEL + MARGIN + zoom[1], left + zoom[2], LABEL + MARGIN + zoom[3]), outline="red", width=3)
    return sheet
