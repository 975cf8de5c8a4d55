"""Pictures: anything that a row may hold becomes a checked RGB image, or a BadRow that says why not."""

from __future__ import annotations

import re
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vlm_taid.errors import BadRow

# Width times height. More is taken for a decompression bomb; raise it for honest large scans.
MAX_PIXELS = 89_478_485
MAX_URL_BYTES = 32 * 2**20
URL_TIMEOUT = 20.0  # seconds
# Named, because some of Pillow's other readers start programs (EPS runs Ghostscript).
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://|data:")


def load_image(value: Any, folder: Path, row: str, *, allow_urls: bool = False) -> Image.Image:
    """Open, check and convert one picture.

    EXIF rotation is applied, transparency is composited on white, 16-bit grey is scaled to 8 bits, of an animation
    the first frame is taken. The result holds no open file and no metadata.

    Args:
        value: a path under ``folder``, the file's bytes, ``{"bytes": ..., "path": ...}`` (bytes go first), an http(s)
            URL, or a PIL image, which is left open.
        folder: the data root. Relative paths start here, and no path may leave it, not even by a symbolic link.
        row: the row's origin, for messages.
        allow_urls: fetch URLs; else they are refused.

    Returns:
        An image of mode RGB.

    Raises:
        BadRow: the file is missing, outside the root, truncated, no picture, too large, empty, of a kind that has no
            agreed brightness range (32-bit floats), or a URL that is not allowed or does not answer.
    """
    name = value
    if isinstance(value, dict):
        name = value.get("path")
        value = name if value.get("bytes") is None else value["bytes"]
    name = f"{name!r:.200}" if isinstance(name, str) else f"({type(value).__name__})"

    def bad(reason: str) -> BadRow:
        return BadRow(row, f"image {name}: {reason}")

    source: Any = None
    if isinstance(value, bytes):
        source = BytesIO(value)
    elif isinstance(value, Image.Image):
        pass
    elif not isinstance(value, str):
        raise bad("expected a path, bytes, a dict of bytes and path, a URL or a PIL image")
    elif _SCHEME.match(value):
        source = BytesIO(_fetch(value, allow_urls, bad))
    else:
        source = _path_under(folder, value, bad)

    try:
        with _strict_pillow():
            if isinstance(value, Image.Image):
                return _to_rgb(value, bad)
            with Image.open(source, formats=READABLE) as image:
                return _to_rgb(image, bad)
    except BadRow:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise bad(_too_large("it has")) from None
    except UnidentifiedImageError:
        raise bad(f"is not a picture, or its header is damaged; expected {', '.join(READABLE)}: replace it") from None
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise bad(f"cannot be decoded, it is truncated or damaged ({error}): replace it or drop the row") from error


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow with our size limit, whose warning is an error, and which never pads a truncated file with grey."""
    saved = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = MAX_PIXELS, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = saved


def _too_large(subject: str) -> str:
    return f"{subject} more than {MAX_PIXELS} pixels, taken for a decompression bomb: shrink it or drop the row"


def _path_under(folder: Path, value: str, bad: Callable[[str], BadRow]) -> Path:
    try:
        root, path = folder.resolve(), (folder / value).resolve()
        inside, is_file = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, links in a circle
        raise bad(f"is no usable path ({error})") from None
    if not inside:
        raise bad(f"lies outside the data root {folder}; move it there, or set `image_root` to a folder above it")
    if not is_file:
        raise bad(f"no such file under the data root {folder}; correct the path, or set `image_root`")
    return path


def _fetch(url: str, allow_urls: bool, bad: Callable[[str], BadRow]) -> bytes:
    if not url.lower().startswith(("http://", "https://")):
        raise bad("only paths and http or https URLs are read")
    if not allow_urls:
        raise bad("URLs are not fetched unless `allow_urls: true`; better, download it and give its path")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vlm-taid"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer:
            content = answer.read(MAX_URL_BYTES + 1)
    except Exception as error:  # urllib lets http.client's, ssl's and socket's errors through
        raise bad(f"cannot be fetched ({error}); download it and give its path") from error
    if len(content) > MAX_URL_BYTES:
        raise bad(f"is larger than {MAX_URL_BYTES} bytes; download it and give its path")
    return content


def _to_rgb(image: Image.Image, bad: Callable[[str], BadRow]) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise bad(f"is empty ({image.width} x {image.height} pixels): replace it or drop the row")
    if image.width * image.height > MAX_PIXELS:
        raise bad(_too_large(f"{image.width} x {image.height} is"))
    image.load()
    with suppress(Exception):  # the pixels are whole: like viewers, show a picture with broken metadata as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; of some formats Pillow makes 32-bit integers in the 16-bit range
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise bad("has values outside 16 bits; convert it to an 8-bit picture")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise bad("holds 32-bit floats, which have no agreed range; convert it to an 8-bit picture")
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image.convert("RGB")
    image.info = {}  # EXIF and colour profiles travel no further: the picture is final
    return image
