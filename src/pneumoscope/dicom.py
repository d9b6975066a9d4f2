"""DICOM to grey pixels: one radiograph a file, shown as its own window says, bones bright.

Owns which DICOM files are radiographs, and the way from stored values to greys. Of a file only the elements in `_READ`
are ever looked at, and none of them is about the patient; what a file says is repeated only where it is a known word.
Knows nothing of other formats, of folders or of how large a picture may be (`images` asks before it decodes).
"""

from __future__ import annotations

import io
import logging
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from pneumoscope import _codestreams, _greys
from pneumoscope.errors import ImageError

NO_PREAMBLE: Final = "The DICOM file lacks its preamble."
NO_SYNTAX: Final = "The DICOM file names no transfer syntax; it was read as uncompressed."
NO_KIND: Final = "The DICOM file does not say what kind of picture it holds."
NO_WINDOW: Final = "The DICOM file has no usable window; its greys run from the 0.5th to the 99.5th percentile."
NOT_CHEST: Final = "The DICOM file names another part of the body than the chest."
LATERAL: Final = "The DICOM file says that this is a lateral view."
RAW: Final = "The DICOM file holds a raw picture, from before the maker's processing for presentation."
BURNED_IN: Final = "The DICOM file says that text is burned into the picture; it may name the patient."
CONTRADICTION: Final = "The DICOM file contradicts itself on what is black; it was inverted."

_READ: Final = (
    "SOPClassUID", "Modality", "PresentationIntentType", "BodyPartExamined", "ViewPosition", "BurnedInAnnotation",
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "PresentationLUTShape", "PixelData", "FloatPixelData", "DoubleFloatPixelData",
)  # fmt: skip
_KINDS: Final = (
    "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1.1",  # CR, DX, raw DX
    "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.2", "1.2.840.10008.5.1.4.1.1.7.3",  # secondary capture
    "1.2.840.10008.5.1.4.1.1.7.4",
)  # fmt: skip
_MODALITIES: Final = ("", "CR", "DX", "DR", "RG", "OT", "SC")
_FOREIGN_MODALITIES: Final = ("CT", "MR", "US", "NM", "PT", "MG", "XA", "RF", "IO", "PX", "ES", "OP", "XC", "RTIMAGE")
_CHEST: Final = ("CHEST", "THORAX", "TORAX", "LUNG")  # also as part of a longer name
_EXPLICIT: Final = "1.2.840.10008.1.2.1"
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
_DECODERS: Final = {  # one each, so that what else is installed never changes a pixel
    "1.2.840.10008.1.2": "", _EXPLICIT: "", _DEFLATED: "", _BIG_ENDIAN: "",
    "1.2.840.10008.1.2.5": "rle",
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "jpeg",  # extended
    "1.2.840.10008.1.2.4.57": "jpeg", "1.2.840.10008.1.2.4.70": "jpeg",  # lossless
    "1.2.840.10008.1.2.4.80": "pyjpegls", "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pillow", "1.2.840.10008.1.2.4.91": "pillow",  # JPEG 2000
}  # fmt: skip
_COLOURS: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_MAX_INFLATED_BYTES: Final = 2**28  # more than the largest picture that is decoded
_LOGGERS: Final = ("pydicom", "jpeg_ls")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Radiograph:
    """A DICOM file that proved to be one radiograph; its pixels are not decoded yet.

    Attributes
    ----------
    width_px, height_px : int
        As the file claims them: judge them before `decode`.
    notes : tuple of str
        Sentences on what a reader of the results should know, of those at the top of this module.
    """

    width_px: int
    height_px: int
    notes: tuple[str, ...]
    _coded: bytes = field(repr=False)
    _layout: _Layout = field(repr=False)
    _tone: _greys.Tone = field(repr=False)

    def decode(self) -> npt.NDArray[np.uint8]:
        """Decode the pixels into greys.

        Returns
        -------
        ndarray of uint8, shape (H, W)
            0 is black, 255 white; padding is black.

        Raises
        ------
        ImageError
            Where the pixels are truncated or damaged, or the file's window shows nothing of them.
        """
        stored = _safely(lambda: _stored(self._coded, self._layout))
        if self._layout.colour:
            return stored
        patterns = np.arange(1 << self._layout.bits_allocated)
        return _greys.show(stored, _meaning_of(patterns, self._layout), self._tone)


@dataclass(frozen=True)
class _Layout:
    """How the pixels lie in the file; the names are those that pydicom's decoders take."""

    rows: int
    columns: int
    photometric_interpretation: str
    samples_per_pixel: int
    planar_configuration: int
    bits_allocated: int
    bits_stored: int
    pixel_representation: int
    pixel_vr: str
    syntax: str

    @property
    def colour(self) -> bool:
        return self.samples_per_pixel == 3

    @property
    def decoder(self) -> str:
        return _DECODERS[self.syntax]

    @property
    def n_bytes(self) -> int:
        stored = 2 if self.photometric_interpretation == "YBR_FULL_422" else self.samples_per_pixel
        return self.rows * self.columns * stored * (self.bits_allocated // 8)


def is_dicom(data: bytes) -> bool:
    """Say whether a file begins like DICOM, with its preamble or without.

    Parameters
    ----------
    data : bytes
        The file, or its first 132 bytes.
    """
    if data[128:132] == b"DICM":
        return True
    # without: the first element is the length of group 2, or of group 8 and low
    return data[:6] == b"\x02\x00\x00\x00UL" or (data[:2] == b"\x08\x00" and data[3:4] == b"\x00")


def read(data: bytes) -> Radiograph:
    """Read all of a file but its pixels.

    Parameters
    ----------
    data : bytes
        The whole file.

    Returns
    -------
    Radiograph

    Raises
    ------
    ImageError
        Where the file is no radiograph (another kind or modality, several frames, no pixels), where it stores its
        pixels in a way that is not read, or where it is truncated or damaged.
    """
    return _safely(lambda: _read(data))


class _Quiet:
    """Hold back what decoding libraries warn of and log: it may quote the patient.

    Warnings and logging are settings of the whole process, so that the first of several threads changes them and the
    last one changes them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._undo = ExitStack()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                for name in _LOGGERS:
                    logger = logging.getLogger(name)
                    self._undo.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL + 1)
            self._users += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()


quiet: Final = _Quiet()
"""``with quiet:`` around every call of a decoding library, in this module and in `images`."""


def _safely(work: Callable[[], _T]) -> _T:
    """Run what meets foreign bytes; whatever a library raises becomes an ImageError that repeats nothing of it."""
    try:
        with quiet:
            return work()
    except (ImageError, MemoryError):
        raise
    except EOFError:
        error = _truncated()
    except Exception:  # pydicom's parsers raise of every kind, and quote values in their messages
        error = _damaged()
    raise error  # out here, so that the library's error does not hang on ours


def _damaged() -> ImageError:
    return ImageError("damaged", "The DICOM file is damaged; get it again.")


def _truncated() -> ImageError:
    return ImageError("truncated", "The DICOM file ends before its pixels do; get it again.")


# --- what a file says ------------------------------------------------------------------------------------------------


def _read(data: bytes) -> Radiograph:
    elements, syntax, notes = _parse(data)
    notes += _require_radiograph(elements)
    if "PixelData" not in elements or not elements["PixelData"].value:
        raise _no_pixels(elements)
    layout = _layout(elements, syntax)
    coded = _coded(elements["PixelData"], layout)
    tone = _tone(elements, layout)
    if tone.voi is None:
        notes.append(NO_WINDOW)
    if tone.inverted and layout.photometric_interpretation == "MONOCHROME2":
        notes.append(CONTRADICTION)
    return Radiograph(layout.columns, layout.rows, tuple(notes), coded, layout, tone)


def _parse(data: bytes) -> tuple[Any, str, list[str]]:
    """Return the elements of `_READ`, the transfer syntax, and notes on what the file lacks."""
    from pydicom.dataset import Dataset  # 0.2 s to load, and most data sets hold no DICOM

    has_preamble = data[128:132] == b"DICM"
    stream = io.BytesIO(data)
    stream.seek(132 if has_preamble else 0)
    meta = Dataset(_elements(stream, ("TransferSyntaxUID",), implicit=False, little=True, group=2))
    syntax, start = str(meta.get("TransferSyntaxUID") or ""), stream.tell()
    notes = [note for note, wanted in ((NO_PREAMBLE, not has_preamble), (NO_SYNTAX, not syntax)) if wanted]
    if syntax == _DEFLATED:
        stream, start = io.BytesIO(_inflated(data[start:])), 0
    head = stream.read(6)
    stream.seek(start)
    implicit = not (head[4:].isalpha() and head[4:].isupper())  # what the file does counts, not what it says
    little = syntax != _BIG_ENDIAN
    found = _elements(stream, _READ, implicit=implicit, little=little)
    elements = Dataset(found)
    elements.set_original_encoding(implicit, little, "iso8859")
    if "PixelData" not in elements and stream.tell() >= stream.getbuffer().nbytes and _is_cut(stream, found):
        raise _truncated()
    if not syntax:
        syntax = _EXPLICIT
        if "PixelData" in elements and elements["PixelData"].is_undefined_length:
            raise ImageError(
                "no transfer syntax",
                "The DICOM file holds compressed pixels but does not name their transfer syntax; export it again.",
            )
    return elements, syntax, notes


def _elements(
    stream: io.BytesIO, keywords: Sequence[str], *, implicit: bool, little: bool, group: int | None = None
) -> dict[Any, Any]:
    """Read the elements with the given keywords, of one group where given; all others are passed over unread."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import data_element_generator

    wanted = [tag_for_keyword(keyword) for keyword in keywords]
    found = data_element_generator(
        stream,
        is_implicit_VR=implicit,
        is_little_endian=little,
        stop_when=None if group is None else lambda tag, vr, length: tag >> 16 != group,
        specific_tags=wanted,
    )
    return {element.tag: element for element in found if element.tag in wanted}  # pydicom adds the character set


def _is_cut(stream: io.BytesIO, found: Mapping[Any, Any]) -> bool:
    """Say whether the last element claims more bytes than there are."""
    beyond = stream.tell() > stream.getbuffer().nbytes
    return beyond or any(len(element.value or b"") < getattr(element, "length", 0) for element in found.values())


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(data, _MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise ImageError(
            "too large", f"The DICOM file inflates to more than {_MAX_INFLATED_BYTES:,} bytes; export it uncompressed."
        )
    if not inflater.eof:
        raise _truncated()
    return plain


def _first(elements: Any, keyword: str) -> Any:
    """Return an element's first value; None where it has none."""
    value = elements.get(keyword)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = value[0] if len(value) else None
    return None if isinstance(value, str | bytes) and not value else value


def _word(elements: Any, keyword: str) -> str:
    return str(_first(elements, keyword) or "").strip().upper()


def _integer(elements: Any, keyword: str, default: int | None = None) -> int:
    value = _first(elements, keyword)
    if value is None and default is None:
        raise ImageError("damaged", f"The DICOM file does not say its {keyword}; export it again.")
    return int(value) if value is not None else int(default or 0)


def _number(elements: Any, keyword: str) -> float | None:
    value = _first(elements, keyword)
    return None if value is None else float(value)


# --- what is refused, and what is said -------------------------------------------------------------------------------


def _require_radiograph(elements: Any) -> list[str]:
    """Refuse files of other kinds; return notes on what a chest film should not be."""
    kind, modality = str(_first(elements, "SOPClassUID") or ""), _word(elements, "Modality")
    if kind and kind not in _KINDS:
        raise _foreign(_uid_name(kind) or "of another kind")
    if modality not in _MODALITIES:
        raise _foreign(f"of modality {modality}" if modality in _FOREIGN_MODALITIES else "of another modality")
    if (frames := _integer(elements, "NumberOfFrames", 1)) > 1:
        raise ImageError(
            "several frames", f"The DICOM file holds {frames:,} frames, one was expected; export the one to be judged."
        )
    part = _word(elements, "BodyPartExamined")
    raw = kind == _KINDS[2] or _word(elements, "PresentationIntentType") == "FOR PROCESSING"
    said = (
        (NO_KIND, not kind and not modality),
        (NOT_CHEST, bool(part) and not any(name in part for name in _CHEST)),
        (LATERAL, _word(elements, "ViewPosition") in ("LL", "RL", "LATERAL")),
        (RAW, raw),
        (BURNED_IN, _word(elements, "BurnedInAnnotation") == "YES"),
    )
    return [note for note, holds in said if holds]


def _foreign(what: str) -> ImageError:
    return ImageError(
        "not a radiograph", f"The DICOM file is {what}; computed or digital radiography or its capture was expected."
    )


def _uid_name(uid: str) -> str:
    """Return what the standard calls a UID; empty for one that it does not know, because that could be anything."""
    from pydicom.uid import UID_dictionary

    return str(UID_dictionary[uid][0]) if uid in UID_dictionary else ""


def _no_pixels(elements: Any) -> ImageError:
    if "FloatPixelData" in elements or "DoubleFloatPixelData" in elements:
        return _unsupported("floating point")
    return ImageError("no pixels", "The DICOM file holds no pixels; export it with its picture.")


def _unsupported(what: str) -> ImageError:
    return ImageError(
        "unsupported pixels",
        f"The DICOM file stores its pixels as {what}; 8 to 16 bits grey, or 8 bits RGB or YBR, are read.",
    )


def _layout(elements: Any, syntax: str) -> _Layout:
    """Return how the pixels lie, or refuse what is not read."""
    if syntax not in _DECODERS:
        name = _uid_name(syntax) or "an unknown transfer syntax"
        raise ImageError(
            "unsupported compression", f"The DICOM file's pixels are stored as {name}; export it uncompressed."
        )
    layout = _Layout(
        rows=_integer(elements, "Rows"),
        columns=_integer(elements, "Columns"),
        photometric_interpretation=_word(elements, "PhotometricInterpretation"),
        samples_per_pixel=_integer(elements, "SamplesPerPixel", 1),
        planar_configuration=_integer(elements, "PlanarConfiguration", 0),
        bits_allocated=_integer(elements, "BitsAllocated"),
        bits_stored=_integer(elements, "BitsStored"),
        pixel_representation=_integer(elements, "PixelRepresentation", 0),
        pixel_vr=str(elements["PixelData"].VR),
        syntax=syntax,
    )
    space = layout.photometric_interpretation
    known = _COLOURS if layout.colour else ("MONOCHROME1", "MONOCHROME2")
    if space not in known or layout.samples_per_pixel not in (1, 3):
        named = space if space in ("PALETTE COLOR", "HSV", "ARGB", "CMYK") else "another kind of colour"
        raise _unsupported(named)
    bits, allocated = layout.bits_stored, layout.bits_allocated
    high = _integer(elements, "HighBit", bits - 1)
    if allocated not in (8, 16) or not 1 < bits <= allocated or (layout.colour and allocated != 8) or high != bits - 1:
        raise _unsupported(f"{bits} of {allocated} bits{' of colour' * layout.colour}, the highest being bit {high}")
    if layout.rows < 1 or layout.columns < 1 or layout.pixel_representation not in (0, 1):
        raise _damaged()
    return layout


def _coded(element: Any, layout: _Layout) -> bytes:
    """Return the pixels' bytes, or the compressed stream once it is known to hold the picture that the file claims."""
    from pydicom.encaps import get_frame

    if element.is_undefined_length != bool(layout.decoder):
        raise _damaged()
    coded: bytes = element.value
    if not layout.decoder:
        if len(coded) < layout.n_bytes:
            raise _truncated()
        return coded
    coded = bytes(get_frame(coded, 0, number_of_frames=1))
    if layout.decoder == "rle":
        return coded
    frame = _codestreams.read_frame(coded)
    claimed = (layout.columns, layout.rows, layout.samples_per_pixel)
    found = (frame.width_px, frame.height_px, frame.components)
    if found != claimed or frame.precision_bits > layout.bits_allocated:
        raise ImageError(
            "damaged",
            f"The DICOM file says {claimed[0]} x {claimed[1]} pixels and the compressed picture inside "
            f"{found[0]} x {found[1]}, or they differ in depth; export it again.",
        )
    if b"\xff\xd9" not in coded[-16:]:  # with which all JPEG streams end, but for padding
        raise _truncated()
    return coded


# --- pixels ----------------------------------------------------------------------------------------------------------


def _stored(coded: bytes, layout: _Layout) -> npt.NDArray[Any]:
    """Return the stored bit patterns (unsigned, H x W), or luma where the picture has colour."""
    if layout.decoder == "rle":
        return _from_planes(coded, layout)
    if layout.decoder == "jpeg":
        found = _codestreams.decode_jpeg(coded)
        return found.astype(np.uint8) if layout.bits_allocated == 8 else found
    _codestreams.require_few_scans(coded)
    array, space = _by_library(coded, layout)
    if layout.colour:
        return _luma(array, space)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return native.view(f"u{native.itemsize}").reshape(layout.rows, layout.columns)


def _by_library(coded: bytes, layout: _Layout) -> tuple[npt.NDArray[Any], str]:
    """Let pydicom, with the one library that `_DECODERS` names, decode pixels; return them and their colour space."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder

    array, found = get_decoder(layout.syntax).as_array(
        encapsulate([coded]) if layout.decoder else coded,
        index=0,
        raw=True,
        view_only=True,
        decoding_plugin=layout.decoder,
        number_of_frames=1,
        pixel_keyword="PixelData",
        correct_unused_bits=False,  # `_meaning_of` does, without a copy
        apply_j2k_sign_correction=True,
        **{name: value for name, value in vars(layout).items() if name != "syntax"},
    )
    return array, str(found["photometric_interpretation"])


def _from_planes(coded: bytes, layout: _Layout) -> npt.NDArray[Any]:
    n_bytes = layout.bits_allocated // 8
    planes = _codestreams.decode_rle(
        coded, size=layout.rows * layout.columns, n_segments=layout.samples_per_pixel * n_bytes
    )
    octets = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=-1)
    octets = octets.reshape(layout.rows, layout.columns, -1)
    return _luma(octets, layout.photometric_interpretation) if layout.colour else octets.view(f">u{n_bytes}")[..., 0]


def _luma(array: npt.NDArray[Any], space: str) -> npt.NDArray[np.uint8]:
    """Return ITU-R 601 luma, which is also what YBR's first channel holds."""
    if space.startswith("YBR"):
        return np.ascontiguousarray(array[..., 0])
    return np.asarray(Image.fromarray(array).convert("L"), dtype=np.uint8)


# --- tones -----------------------------------------------------------------------------------------------------------


def _tone(elements: Any, layout: _Layout) -> _greys.Tone:
    """Return what the file says is to be made of its stored values."""
    if layout.colour:
        return _greys.Tone(None, _greys.as_it_is, inverted=False, padding=None)
    modality, voi = _modality(elements, layout), _voi(elements, layout)
    if voi is None and modality is None and layout.bits_stored == 8 and not layout.pixel_representation:
        voi = _greys.as_it_is  # eight bits without a window were made for the screen
    inverted = (
        layout.photometric_interpretation == "MONOCHROME1" or _word(elements, "PresentationLUTShape") == "INVERSE"
    )
    padding = None
    if (value := _first(elements, "PixelPaddingValue")) is not None:
        limit = _first(elements, "PixelPaddingRangeLimit")
        ends = sorted(_meaning_of(int(end), layout) for end in (value, value if limit is None else limit))
        padding = (ends[0], ends[1])
    return _greys.Tone(modality, voi, inverted, padding)


def _meaning_of(pattern: Any, layout: _Layout) -> Any:
    """Return the number that a bit pattern, or each of an array, stands for: unused bits do not count."""
    value = pattern & ((1 << layout.bits_stored) - 1)
    sign = layout.bits_stored - 1
    return value - (((value >> sign) & layout.pixel_representation) << layout.bits_stored)


def _modality(elements: Any, layout: _Layout) -> _greys.Map | None:
    if lut := _lut(_first(elements, "ModalityLUTSequence"), layout):
        return lut[0]
    slope, intercept = _number(elements, "RescaleSlope"), _number(elements, "RescaleIntercept")
    a, b = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    if not np.isfinite(a * 2**17) or not np.isfinite(b) or a == 0:
        raise ImageError(
            "unusable rescale",
            f"The DICOM file's rescale slope is {a:g} and its intercept {b:g}; numbers that keep the picture were "
            "expected, so export it again.",
        )
    return None if (a, b) == (1, 0) else lambda values: values * a + b


def _voi(elements: Any, layout: _Layout) -> _greys.Map | None:
    """Return the first lookup table or else the first window, to greys from 0 to 255; None where none is usable."""
    if lut := _lut(_first(elements, "VOILUTSequence"), layout):
        look_up, top = lut
        return lambda values: look_up(values) * (255 / top)
    center, width = _number(elements, "WindowCenter"), _number(elements, "WindowWidth")
    if center is None or width is None:
        return None
    return _greys.window(center, width, _word(elements, "VOILUTFunction") or "LINEAR")


def _lut(item: Any, layout: _Layout) -> tuple[_greys.Map, float] | None:
    """Return a lookup table (PS3.3 C.11.1.1) and its largest possible output; None where there is none."""
    if item is None or item.get("LUTDescriptor") is None or item.get("LUTData") is None:
        return None
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    entries = entries & 0xFFFF or 65536
    if layout.pixel_representation and first > 32767:
        first -= 65536  # a negative number that was written as an unsigned one
    data = item.LUTData
    if isinstance(data, bytes):
        packed = len(data) < 2 * entries and bits <= 8  # two entries in a word
        order = ">" if layout.syntax == _BIG_ENDIAN else "<"
        data = np.frombuffer(data, "u1" if packed else f"{order}u2", entries)
    table = np.atleast_1d(np.asarray(data, dtype=np.float64))[:entries]
    if len(table) < entries or not 1 <= bits <= 16:
        raise _damaged()
    return _greys.lookup(table, first), 2.0**bits - 1
