"""Single pictures out of a run's archives, exact, without unpacking the archive whole."""

import io
import re
import zipfile
from functools import lru_cache

import numpy as np
from PIL import Image

from .files import Missing, RunFiles, Unreadable

_HEADER = re.compile(rb"{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d+), (\d+), (\d+), 3\), }\s*")


def _open(archive: zipfile.ZipFile):
    """The stream of the pictures, past its header, with their shape `(n, height, width)`.

    NumPy's reader of headers parses Python, which CPython 3.11 cannot do in one thread while another imports torch.
    """
    stream = archive.open("images.npy")
    magic = stream.read(8)
    length = int.from_bytes(stream.read(2 if magic[6:7] == b"\x01" else 4), "little")
    header = _HEADER.fullmatch(stream.read(min(length, 1024)))
    if magic[:6] != b"\x93NUMPY" or header is None:
        raise ValueError("it does not hold pictures")
    return stream, tuple(map(int, header.groups()))


def count(files: RunFiles, name: str) -> int:
    """How many pictures the archive `images/<name>.npz` holds; 0 where there is none."""
    if not files.has("images", f"{name}.npz"):
        return 0
    try:
        with zipfile.ZipFile(files.path("images", f"{name}.npz")) as archive:
            return _open(archive)[1][0]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return 0


def picture(files: RunFiles, name: str, index: int) -> Image.Image:
    """Picture `index` of the archive `images/<name>.npz`. Raises Missing or Unreadable."""
    path = files.path("images", f"{name}.npz")
    try:
        with zipfile.ZipFile(path) as archive:
            stream, (n, height, width) = _open(archive)
            if not 0 <= index < n:
                raise Missing(f"picture {index} is not among the {n} of {name}.")
            size = height * width * 3
            stream.seek(stream.tell() + index * size)
            pixels = np.frombuffer(stream.read(size), np.uint8).reshape(height, width, 3)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise Unreadable(f"images/{name}.npz cannot be read: {error}.") from None
    return Image.fromarray(pixels)


def png(files: RunFiles, name: str, index: int) -> bytes:
    """The picture as PNG, every pixel as the pipeline drew it."""
    stat = files.path("images", f"{name}.npz").stat()
    return _png(files, name, index, stat.st_mtime_ns)


@lru_cache(maxsize=512)
def _png(files: RunFiles, name: str, index: int, _time: int) -> bytes:
    buffer = io.BytesIO()
    picture(files, name, index).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def webp(files: RunFiles, name: str, index: int, longest: int = 288) -> bytes:
    """The picture at most `longest` pixels long; small ones exact."""
    image, buffer = picture(files, name, index), io.BytesIO()
    small = max(image.size) <= 128
    image.thumbnail((longest, longest))
    image.save(buffer, "WEBP", lossless=small, quality=82)
    return buffer.getvalue()
