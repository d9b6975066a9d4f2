"""Compressed streams inside DICOM: their headers, and the decoding of those for which no safe library is at hand.

These are lossless JPEG (process 14), JPEG 12 bits deep (process 4) and RLE: the C++ library that reads the first two
ends the whole process on damaged bytes, and a few bytes of RLE can stand for gigabytes. Knows nothing of DICOM's
elements or of what pixels mean. After ITU-T T.81 and DICOM PS3.5 annex G, whose figures and tables are named below.

The length of a Huffman symbol is looked up for every bit position at once; a plain loop then follows the chain from
symbol to symbol, and all values are taken together from where the chain has been.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumoscope.errors import ImageError

_LOSSLESS = 0xC3
_SEQUENTIAL = (0xC0, 0xC1)
_JPEG_2000 = b"\xff\x4f\xff\x51"  # the first two markers of a codestream, which may stand in a JP2 box
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 and JPEG-LS, without DHT, JPG and DAC
_RESTARTS = re.compile(rb"\xff[\xd0-\xd7]")
_SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
# Libjpeg skips all before the next marker, and takes those that are not here for markers without a length, or for none.
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xd9-\xfe])")
_MOST_SCANS = 100  # progressive files have about ten; each decodes the whole picture once more
_MOST_SEGMENTS = 10_000  # of 64 kB each they would be 640 MB; a loop in Python follows them
_CHUNK_BYTES = 1 << 17  # looked at together: some MB of tables, whatever the stream's length
_MARGIN_BYTES = 512  # no block of 64 coefficients is longer
_ZIGZAG = np.array([  # figure A.6, as row * 8 + column
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
])  # fmt: skip

_Ints = npt.NDArray[np.int64]
_Predict = Callable[[_Ints, _Ints, _Ints], _Ints]
_PREDICTORS: dict[int, _Predict] = {  # table H.1, of the samples to the left, above, and above to the left
    2: lambda left, above, corner: above,
    3: lambda left, above, corner: corner,
    4: lambda left, above, corner: left + above - corner,
    5: lambda left, above, corner: left + ((above - corner) >> 1),
    6: lambda left, above, corner: above + ((left - corner) >> 1),
    7: lambda left, above, corner: (left + above) >> 1,
}


@dataclass(frozen=True)
class Frame:
    """What the header of a JPEG, JPEG-LS or JPEG 2000 stream says.

    Attributes
    ----------
    process : int
        The marker before the header, for example 0xC3 for lossless JPEG.
    precision_bits : int
        Depth of a sample.
    width_px, height_px : int
    components : int
        1 for grey.
    """

    process: int
    precision_bits: int
    width_px: int
    height_px: int
    components: int


@dataclass
class _Stream:
    """The segments before the pixels, and the pixels' coded bytes between restarts."""

    frame: Frame | None = None
    huffman: dict[int, _Huffman] = field(default_factory=dict)  # class * 16 + number
    quantization: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    quantizer: int = 0
    restart_interval: int = 0
    scan: bytes = b""
    coded: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class _Huffman:
    """A code as tables over the next 16 bits; a length of 0 stands where no symbol has that code."""

    length: npt.NDArray[np.uint8]
    symbol: npt.NDArray[np.uint8]


def read_frame(data: bytes) -> Frame:
    """Read a stream's header without decoding anything.

    Parameters
    ----------
    data : bytes
        The whole stream.

    Returns
    -------
    Frame

    Raises
    ------
    ImageError
        Where no whole header is there.
    """
    at = -1 if data.startswith(b"\xff\xd8") else data.find(_JPEG_2000, 0, 512)
    if at >= 0 and len(data) >= at + 43:
        _, _, right, bottom, left, top, *_, components, depth = struct.unpack_from(">HH8LHB", data, at + 4)
        return Frame(0x51, (depth & 127) + 1, right - left, bottom - top, components)
    frame = _parse(data, until_scan=False).frame
    if frame is None:
        raise _damaged()
    return frame


def decode_jpeg(data: bytes) -> npt.NDArray[np.uint16]:
    """Decode a lossless or a sequential JPEG stream of one component.

    Parameters
    ----------
    data : bytes
        The whole stream.

    Returns
    -------
    ndarray of uint16, shape (H, W)

    Raises
    ------
    ImageError
        Where the stream is truncated or damaged, or is of another kind.
    """
    stream = _parse(data, until_scan=True)
    frame = stream.frame
    if frame is None or len(stream.scan) < 6 or not frame.height_px or not frame.width_px:
        raise _damaged()
    if frame.components != 1 or stream.scan[0] != 1 or frame.process not in (_LOSSLESS, *_SEQUENTIAL):
        raise ImageError(
            "unsupported compression",
            "The JPEG stream is neither lossless nor sequential of one grey component; store the picture uncompressed.",
        )
    if frame.process == _LOSSLESS:
        return _decode_lossless(stream, frame)
    return _decode_blocks(stream, frame)


def require_few_scans(data: bytes) -> None:
    """Refuse a JPEG of so many scans that decoding it would take minutes, whatever its size; other data pass.

    Parameters
    ----------
    data : bytes
        A whole file or codestream.

    Raises
    ------
    ImageError
        Where a JPEG has over 100 scans, or so many segments that nobody can tell.
    """
    # Counting the marker's bytes takes no time; they may stand in comments too, or behind the picture, as in a video.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MOST_SCANS and _has_many_scans(data):
        raise ImageError(
            "damaged",
            f"The JPEG has over {_MOST_SCANS} scans, or over {_MOST_SEGMENTS:,} segments; no more are decoded. "
            "Save it anew.",
        )


def decode_rle(data: bytes, *, size: int, n_segments: int) -> list[bytes]:
    """Decode the byte planes of an RLE frame.

    Parameters
    ----------
    data : bytes
        The whole frame.
    size : int
        Bytes of a plane: rows times columns. No more are made, whatever the frame holds.
    n_segments : int
        Planes: of each sample the highest byte first.

    Returns
    -------
    list of bytes
        `n_segments` of them, `size` bytes each.

    Raises
    ------
    ImageError
        Where the frame is truncated or damaged.
    """
    if len(data) < 64 or int.from_bytes(data[:4], "little") != n_segments:
        raise ImageError("damaged", "The RLE data are damaged; get the file again.")
    offsets = [*struct.unpack_from(f"<{n_segments}L", data, 4), len(data)]
    return [_unpack_bits(data[start:end], size) for start, end in pairwise(offsets)]


def _unpack_bits(coded: bytes, size: int) -> bytes:
    """Undo the byte-wise run lengths of annex G.3.1."""
    plain = bytearray()
    at = 0
    while len(plain) < size and at + 1 < len(coded):
        head = coded[at]
        if head < 128:
            plain += coded[at + 1 : at + 2 + head]
            at += 2 + head
        else:
            if head > 128:
                plain += coded[at + 1 : at + 2] * (257 - head)
            at += 2 if head > 128 else 1
    if len(plain) < size:
        raise ImageError("truncated", "The RLE data end before the picture does; get the file again.")
    return bytes(plain[:size])


def _damaged() -> ImageError:
    return ImageError("damaged", "The JPEG stream is damaged; get the file again.")


def _truncated() -> ImageError:
    return ImageError("truncated", "The JPEG stream ends before the picture does; get the file again.")


# --- markers ---------------------------------------------------------------------------------------------------------


def _parse(data: bytes, *, until_scan: bool) -> _Stream:
    """Read the segments up to the frame header, or up to and with the coded pixels."""
    stream = _Stream()
    if data[:2] != b"\xff\xd8":
        raise _damaged()
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise _damaged()
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        body = data[at + 4 : at + 2 + size]
        if size < 2 or len(body) != size - 2 or marker in range(0xD0, 0xDA):
            raise _damaged() if size < 2 else _truncated()
        at += 2 + size
        try:
            _take_segment(stream, marker, body)
        except (struct.error, IndexError, ValueError) as error:
            raise _damaged() from error
        if marker == 0xDA:
            stream.scan, stream.coded = body, _coded(data, at)
        if marker == 0xDA or (stream.frame is not None and not until_scan):
            return stream
    raise _truncated()


def _has_many_scans(data: bytes) -> bool:
    """Walk the segments of the first picture: more scans than are decoded, or more segments than are looked at."""
    scans, at = 0, 2
    for _ in range(_MOST_SEGMENTS):
        found = _SEGMENT.search(data, at)
        if found is None or found[1] == b"\xd9":
            return False
        scans += found[1] == b"\xda"
        if scans > _MOST_SCANS:
            return True
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    return True


def _take_segment(stream: _Stream, marker: int, body: bytes) -> None:
    if marker in _FRAMES and stream.frame is None:
        precision, height, width, components = struct.unpack(">BHHB", body[:6])
        stream.frame = Frame(marker, precision, width, height, components)
        stream.quantizer = body[8] if len(body) > 8 else 0
    elif marker == 0xC4:
        while body:
            counts = body[1:17]
            n = sum(counts)
            stream.huffman[body[0]] = _huffman(counts, body[17 : 17 + n])
            body = body[17 + n :]
    elif marker == 0xDB:
        while body:
            kind, n = (">u2", 128) if body[0] >> 4 else (">u1", 64)
            stream.quantization[body[0] & 15] = np.frombuffer(body[1 : 1 + n], kind, 64).astype(np.float32)
            body = body[1 + n :]
    elif marker == 0xDD:
        (stream.restart_interval,) = struct.unpack(">H", body[:2])


def _coded(data: bytes, start: int) -> list[bytes]:
    """Return the scan's bytes between restart markers, without the zeros stuffed after each 0xFF."""
    end = _SCAN_END.search(data, start)
    if end is None:
        raise _truncated()
    if data[end.end() - 1] != 0xD9:
        raise ImageError(
            "unsupported compression", "The JPEG stream has more than one scan; store the picture uncompressed."
        )
    return [part.replace(b"\xff\x00", b"\xff") for part in _RESTARTS.split(data[start : end.start()])]


def _huffman(counts: bytes, symbols: bytes) -> _Huffman:
    """Lay out a code by annex C: shortest first, in order."""
    lengths = np.repeat(np.arange(1, 17), np.frombuffer(counts, np.uint8))
    if len(lengths) != len(symbols) or len(counts) != 16:
        raise ValueError("a table of fewer symbols than it counts")
    spans = 1 << (16 - lengths)
    unused = 65536 - int(spans.sum())
    if unused < 0:
        raise ValueError("more codes than there are")
    table = [np.repeat(values.astype(np.uint8), spans) for values in (lengths, np.frombuffer(symbols, np.uint8))]
    return _Huffman(*(np.pad(values, (0, unused)) for values in table))


# --- bits ------------------------------------------------------------------------------------------------------------


def _windows(coded: bytes, start: int) -> tuple[_Ints, npt.NDArray[np.uint16]]:
    """Return 40 bits from each byte of a chunk, and 16 bits from each bit position; ones stand behind the end."""
    size = _CHUNK_BYTES + _MARGIN_BYTES
    octets = np.frombuffer(coded[start : start + size + 4].ljust(min(size, len(coded) - start) + 4, b"\xff"), np.uint8)
    wide = np.zeros(len(octets) - 4, np.int64)
    for at in range(5):
        wide = (wide << 8) | octets[at : len(wide) + at]
    near = (wide >> 16).astype(np.uint32)  # the first 24 bits
    ahead = np.empty((len(wide), 8), np.uint16)
    for at in range(8):
        ahead[:, at] = near >> (8 - at)  # the cast keeps the lowest 16 bits
    return wide, ahead.reshape(-1)


def _values(wide: _Ints, positions: _Ints, n_bits: _Ints) -> _Ints:
    """Return the signed numbers of `n_bits` bits at bit positions (table F.1 and figure F.12)."""
    drop = 40 - (positions & 7) - n_bits
    raw = (wide[np.minimum(positions >> 3, len(wide) - 1)] >> drop) & ((1 << n_bits) - 1)
    negative = (n_bits > 0) & (raw >> np.maximum(n_bits - 1, 0) == 0)
    return np.asarray(np.where(negative, raw - (1 << n_bits) + 1, raw), dtype=np.int64)


def _table(stream: _Stream, key: int) -> _Huffman:
    table = stream.huffman.get(key)
    if table is None:
        raise _damaged()
    return table


# --- lossless --------------------------------------------------------------------------------------------------------


def _decode_lossless(stream: _Stream, frame: Frame) -> npt.NDArray[np.uint16]:
    table = _table(stream, stream.scan[2] >> 4)
    predictor, transform = stream.scan[3], stream.scan[5] & 15
    width, height, precision = frame.width_px, frame.height_px, frame.precision_bits
    rows, rest = divmod(stream.restart_interval or width * height, width)
    if rest or not 1 <= predictor <= 7 or not 2 <= precision <= 16 or transform >= precision:
        raise _damaged()
    if len(stream.coded) < -(-height // rows):
        raise _truncated()
    pixels = np.empty((height, width), np.uint16)
    for at, coded in zip(range(0, height, rows), stream.coded, strict=False):
        block = pixels[at : at + rows]
        block.reshape(-1)[:] = _differences(coded, table, block.size)
        _undo_prediction(block, predictor, first=1 << (precision - transform - 1))
    np.left_shift(pixels, transform, out=pixels)
    return pixels


def _differences(coded: bytes, table: _Huffman, count: int) -> npt.NDArray[np.uint16]:
    """Decode `count` differences, modulo 65,536 (H.1.2.2)."""
    known = (table.length > 0) & (table.symbol <= 16)
    extra = np.where(table.symbol < 16, table.symbol, 0)  # category 16 is always 32,768 and has no bits of its own
    steps_of = np.where(known, table.length + extra, 255).astype(np.uint8)  # past what is unknown, to end the loop
    found = np.empty(count, np.uint16)
    done = position = 0
    while done < count:
        start = position >> 3
        if start >= len(coded):
            raise _truncated()
        wide, ahead = _windows(coded, start)
        steps = steps_of[ahead].tobytes()
        at, limit = position - 8 * start, min(8 * _CHUNK_BYTES, len(steps))
        chain: list[int] = []
        note = chain.append
        while at < limit:  # the one slow loop: once for each sample
            note(at)
            at += steps[at]
        note(at)
        positions = np.array(chain[: count - done + 1])
        position, positions = 8 * start + int(positions[-1]), positions[:-1]
        codes = ahead[positions]
        if not known[codes].all():
            raise _damaged()
        size = table.symbol[codes].astype(np.int64)
        values = _values(wide, positions + table.length[codes], np.where(size == 16, 0, size))
        found[done : done + len(values)] = np.where(size == 16, 32768, values) & 0xFFFF
        done += len(values)
    if position > 8 * len(coded):
        raise _truncated()
    return found


def _undo_prediction(block: npt.NDArray[np.uint16], predictor: int, *, first: int) -> None:
    """Turn differences into samples in place (H.1.2.1): the first row from the left, the first column from above."""
    height, width = block.shape
    block[0, 0] = (int(block[0, 0]) + first) & 0xFFFF
    np.cumsum(block[:, 0], dtype=np.uint16, out=block[:, 0])
    if predictor == 1 or height == 1 or width == 1:
        np.cumsum(block, axis=1, dtype=np.uint16, out=block)
        return
    np.cumsum(block[0], dtype=np.uint16, out=block[0])
    predict, flat = _PREDICTORS[predictor], block.reshape(-1)
    for diagonal in range(2, height + width - 1):  # all samples of one diagonal depend on the two before it alone
        top = max(1, diagonal - width + 1)
        n = min(height - 1, diagonal - 1) - top + 1
        start, stop = top * width + diagonal - top, top * width + diagonal - top + (n - 1) * (width - 1) + 1
        left, above, corner = (
            flat[start - back : stop - back : width - 1].astype(np.int64) for back in (1, width, width + 1)
        )
        place = flat[start : stop : width - 1]
        place[:] = (place + predict(left, above, corner)) & 0xFFFF


# --- blocks of cosines -----------------------------------------------------------------------------------------------


def _decode_blocks(stream: _Stream, frame: Frame) -> npt.NDArray[np.uint16]:
    across, down = -(-frame.width_px // 8), -(-frame.height_px // 8)
    per_restart = stream.restart_interval or across * down
    quantization = stream.quantization.get(stream.quantizer)
    if per_restart % across or quantization is None or frame.precision_bits not in (8, 12):
        raise _damaged()
    if len(stream.coded) < -(-across * down // per_restart):
        raise _truncated()
    tables = _table(stream, stream.scan[2] >> 4), _table(stream, 0x10 | stream.scan[2] & 15)
    coefficients = np.zeros((across * down, 64), np.int16)
    for at, coded in zip(range(0, len(coefficients), per_restart), stream.coded, strict=False):
        _fill_coefficients(coefficients[at : at + per_restart], coded, *tables)
    pixels = np.empty((8 * down, 8 * across), np.uint16)
    basis = _cosines()
    middle, top = 1 << (frame.precision_bits - 1), (1 << frame.precision_bits) - 1
    for row in range(down):  # a row of blocks at a time, so that no float picture is made
        dequantized = np.zeros((across, 64), np.float32)
        dequantized[:, _ZIGZAG] = coefficients[row * across : (row + 1) * across] * quantization
        blocks = basis.T @ dequantized.reshape(-1, 8, 8) @ basis
        samples = np.clip(np.rint(blocks + middle), 0, top).astype(np.uint16)
        pixels[8 * row : 8 * row + 8] = samples.transpose(1, 0, 2).reshape(8, -1)
    return np.ascontiguousarray(pixels[: frame.height_px, : frame.width_px])


def _cosines() -> npt.NDArray[np.float32]:
    """Return the cosine basis, frequency by place (A.3.3)."""
    frequency, place = np.mgrid[:8, :8]
    basis = np.cos((2 * place + 1) * frequency * np.pi / 16) / 2
    basis[0] /= np.sqrt(2)
    return np.asarray(basis, dtype=np.float32)


def _fill_coefficients(blocks: npt.NDArray[np.int16], coded: bytes, dc: _Huffman, ac: _Huffman) -> None:
    """Decode the coefficients of one restart interval, in zigzag order (F.2.2)."""
    ac_size, run = ac.symbol & 15, ac.symbol >> 4
    dc_steps_of = np.where(dc.symbol <= 15, dc.length + dc.symbol, 0).astype(np.uint8)
    ac_steps_of = (ac.length + ac_size).astype(np.uint8)
    skips_of = np.where((ac_size > 0) | (run == 15), run + 1, 64).astype(np.uint8)  # 64: the end of the block
    skips_of[ac.length == 0] = 64
    done = position = 0
    while done < len(blocks):
        start = position >> 3
        if start >= len(coded):
            raise _truncated()
        wide, ahead = _windows(coded, start)
        dc_steps, ac_steps, skips = (table[ahead].tobytes() for table in (dc_steps_of, ac_steps_of, skips_of))
        at, limit = position - 8 * start, min(8 * _CHUNK_BYTES, len(ahead))
        dc_chain: list[int] = []
        ac_chain: list[int] = []
        ranks: list[int] = []
        ends = [0]
        while at < limit and done + len(dc_chain) < len(blocks):
            dc_chain.append(at)
            at += dc_steps[at]
            rank = 0
            while rank < 63 and at < len(ahead):
                rank += skips[at]
                ac_chain.append(at)
                ranks.append(rank)
                at += ac_steps[at]
            ends.append(len(ac_chain))
        part = blocks[done : done + len(dc_chain)]
        part[:, 0] = _numbers(wide, ahead, dc_chain, dc, dc.symbol)
        values = _numbers(wide, ahead, ac_chain, ac, ac_size)
        column, row = np.array(ranks, np.int64), np.repeat(np.arange(len(part)), np.diff(ends))
        if (values[column > 63] != 0).any():
            raise _damaged()
        part[row[column <= 63], column[column <= 63]] = values[column <= 63]
        done += len(dc_chain)
        position = 8 * start + at
    if position > 8 * len(coded):
        raise _truncated()
    blocks[:, 0] = np.cumsum(blocks[:, 0], dtype=np.int16)


def _numbers(
    wide: _Ints, ahead: npt.NDArray[np.uint16], chain: list[int], table: _Huffman, sizes_of: npt.NDArray[Any]
) -> _Ints:
    """Return the number behind each symbol of a chain of positions."""
    positions = np.array(chain, np.int64)
    codes = ahead[positions]
    sizes = sizes_of[codes].astype(np.int64)
    if not table.length[codes].all() or (sizes > 15).any():
        raise _damaged()
    return _values(wide, positions + table.length[codes], sizes)
