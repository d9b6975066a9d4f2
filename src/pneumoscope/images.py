"""Bytes to grey pixels: the only decoder and the only resizer, so that training and serving can never differ.

Owns what a file's bytes mean as an image. Knows nothing of folders, labels or networks.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pneumoscope import _codestreams, _npy, dicom
from pneumoscope.errors import ImageError

DECODER_VERSION = 1
"""Raised whenever the same bytes could give other pixels; stores packed by another version are packed anew."""

MAX_PIXELS = 100_000_000
"""A larger picture is refused from its header, before a pixel of it is decoded."""

MAX_ASPECT = 20
_FORMATS = ("JPEG", "PNG")
# What Pillow raises on damaged bytes, found by changing bytes at random; MemoryError is not the file's fault.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
_NPY_MAGIC = b"\x93NUMPY"
_EXIF_ORIENTATION = 0x0112
_TURNS = {  # by EXIF orientation, what brings the picture upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FOREIGN = (  # what other files begin with, to name them instead of saying "unknown"
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x89HDF", "HDF5"),
    (b"RIFF", "WebP"),
    (b"MZ", "Windows program"),
    (b"\x7fELF", "Linux program"),
)


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its pixels are decoded.

    Attributes
    ----------
    format : str
        ``"JPEG"``, ``"PNG"``, ``"DICOM"`` or ``"NPY"`` (a row of an array archive).
    width_px, height_px : int
        Size after the EXIF orientation is applied.
    frames : int
        Number of pages; only the first is read.
    notes : tuple of str
        Sentences that a reader of a result for this file should know; only DICOM files have any.
    """

    format: str
    width_px: int
    height_px: int
    frames: int
    notes: tuple[str, ...] = ()


def read_header(data: bytes) -> Header:
    """Identify a file by its content, whatever its name says.

    Parameters
    ----------
    data : bytes
        The whole file.

    Returns
    -------
    Header

    Raises
    ------
    ImageError
        For empty, unsupported or unreadable files, and for pictures over `MAX_PIXELS` or with a side ratio over
        `MAX_ASPECT`; for DICOM also as `pneumoscope.dicom.read`. ``reason`` is a few words for the Catalog.
    """
    if data.startswith(_NPY_MAGIC):
        height, width = _read_npy(data).shape
        return Header("NPY", int(width), int(height), 1)
    if dicom.is_dicom(data):
        film = _read_dicom(data)
        return Header("DICOM", film.width_px, film.height_px, 1, film.notes)
    with _opened(data) as image:
        width, height = image.size
        exif = Image.Image.getexif(image)  # that of PNG files decodes the picture to look behind it
        if exif.get(_EXIF_ORIENTATION) in (5, 6, 7, 8):  # those that swap the sides
            width, height = height, width
        format = "PNG" if image.format == "PNG" else "JPEG"  # Pillow calls a JPEG of several pages MPO
        return Header(format, width, height, int(getattr(image, "n_frames", 1)))


def decode(data: bytes, *, at_least_px: int | None = None) -> npt.NDArray[np.uint8]:
    """Decode a file into grey pixels.

    Colour becomes luma (ITU-R 601), transparency is laid over black, 16-bit PNG is divided by 257, EXIF orientation is
    applied, and of several pages the first is read. DICOM is shown through its own window, bones bright.

    Parameters
    ----------
    data : bytes
        The whole file.
    at_least_px : int, optional
        Allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep at least this
        many pixels (libjpeg scales in the frequency domain, which is itself antialiased).

    Returns
    -------
    ndarray of uint8, shape (H, W)
        0 is black, 255 white.

    Raises
    ------
    ImageError
        As `read_header`, and where the pixels are truncated or damaged: never a half-grey picture.
    """
    if data.startswith(_NPY_MAGIC):
        return _read_npy(data)
    if dicom.is_dicom(data):
        return _read_dicom(data).decode()
    with _opened(data) as image:
        if at_least_px is not None and image.format == "JPEG":
            image.draft("L", (at_least_px, at_least_px))
        image.load()
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
        return np.asarray(_to_grey(image if turn is None else image.transpose(turn)), dtype=np.uint8)


def resize(pixels: npt.NDArray[np.uint8], size_px: int) -> npt.NDArray[np.uint8]:
    """Squash grey pixels into a square, antialiased.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (H, W)
    size_px : int
        Side of the result.

    Returns
    -------
    ndarray of uint8, shape (size_px, size_px)
        Bilinear with a support that grows with the reduction, so that no detail folds into false patterns.
    """
    if pixels.shape == (size_px, size_px):
        return pixels
    small = Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.uint8)


def compressed(pixels: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    """Compress grey pixels as a JPEG and decode it again, so that all images carry the traces of the same compression.

    Done twice it changes next to nothing, so that images which were kept so before stay as they are.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (H, W)
    quality : int
        Of libjpeg, 1 to 95.

    Returns
    -------
    ndarray of uint8, shape (H, W)
    """
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    with Image.open(stream, formats=["JPEG"]) as image:
        return np.asarray(image, dtype=np.uint8)


def load(data: bytes, size_px: int, *, jpeg_quality: int = 0) -> npt.NDArray[np.uint8]:
    """Decode, resize and compress in one step: what every model of this project is shown.

    Parameters
    ----------
    data : bytes
        The whole file.
    size_px : int
        Side of the result.
    jpeg_quality : int
        As `compressed`; 0 for no compression.

    Returns
    -------
    ndarray of uint8, shape (size_px, size_px)

    Raises
    ------
    ImageError
        As `decode`.
    """
    square = resize(decode(data, at_least_px=2 * size_px), size_px)
    return compressed(square, jpeg_quality) if jpeg_quality else square


def _read_dicom(data: bytes) -> dicom.Radiograph:
    film = dicom.read(data)
    _require_sane_shape(film.width_px, film.height_px)
    return film


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open bytes with Pillow under our limits; every failure, also while in use, becomes an ImageError."""
    if not data:
        raise ImageError("empty file", "The file holds 0 bytes.")
    _codestreams.require_few_scans(data)
    with dicom.quiet:  # about sizes, judged below, and EXIF data that nobody needs
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError("too large", f"The picture is over {MAX_PIXELS:,} pixels by far ({error}).") from error
        except _DAMAGE as error:
            raise ImageError(*_describe_foreign(data)) from error
        with image:
            _require_sane_shape(*image.size)
            try:
                yield image
            except _DAMAGE as error:
                reason = "truncated" if "truncated" in str(error).lower() else "damaged"
                raise ImageError(reason, f"The picture's data are {reason} ({error}).") from error


def _require_sane_shape(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            "too large", f"The picture is {width} x {height} pixels; at most {MAX_PIXELS:,} pixels are decoded."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            "not a picture's shape",
            f"The picture is {width} x {height} pixels; one side is over {MAX_ASPECT} times the other.",
        )


def _describe_foreign(data: bytes) -> tuple[str, str]:
    if data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n":
        return "damaged", "The file begins like a JPEG or PNG but its header is damaged."
    kind = next((name for magic, name in _FOREIGN if data.startswith(magic)), "")
    if kind:
        return f"unsupported format {kind}", f"The file is {kind}; JPEG, PNG and DICOM are read."
    return "not an image", "The file's content is not an image; JPEG, PNG and DICOM are read."


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image, dtype=np.float64)
        return Image.fromarray(np.clip(np.rint(wide / 257.0), 0, 255).astype(np.uint8))
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return image.convert("L")


def _read_npy(data: bytes) -> npt.NDArray[np.uint8]:
    stream = io.BytesIO(data)
    try:
        shape, fortran, dtype = _npy.read_array_header(stream)
        _require_grey_array(shape, dtype)  # before numpy makes room for whatever the header claims
        pixels = np.frombuffer(stream.read(), dtype=np.uint8)
        return np.ascontiguousarray(pixels.reshape(shape[:2], order="F" if fortran else "C"))
    except _DAMAGE as error:
        raise ImageError("damaged", f"The array cannot be read ({error}).") from error


def _require_grey_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if dtype != np.uint8 or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 1) or 0 in shape:
        raise ImageError("not an image", f"The array is {dtype} of shape {shape}; uint8 of shape (H, W) was expected.")
    _require_sane_shape(shape[1], shape[0])
