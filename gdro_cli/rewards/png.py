"""Images as text, for requests in JSON."""

from __future__ import annotations

import base64
import io

from PIL import Image


def png_base64(image: Image.Image) -> str:
    """An image as PNG, which loses nothing, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # fast: the server is usually near
    return base64.b64encode(buffer.getvalue()).decode("ascii")
