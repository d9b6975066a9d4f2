"""Streams inside DICOM: lossless and 12-bit JPEG against other decoders and a small encoder, RLE, and damage."""

from __future__ import annotations

import io
import struct
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.pixels import get_encoder

from pneumoscope import _codestreams
from pneumoscope.errors import ImageError

Pixels = npt.NDArray[np.uint16]
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


def real_file(name: str) -> Path:
    """Return a file of pydicom or of pydicom-data; `pydicom.data` would look for missing ones on the network."""
    spec = find_spec("data_store")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / name
    return path if path.exists() else BUNDLED / name


def stream_of(name: str) -> bytes:
    return bytes(get_frame(pydicom.dcmread(real_file(name)).PixelData, 0, number_of_frames=1))


def noise(height: int, width: int, bits: int, seed: int = 0) -> Pixels:
    """Return a picture with a ramp, noise and both extremes, so that every size of difference occurs."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height), np.arange(width)) * (1 << bits) // (height + width)
    pixels = np.clip(ramp + rng.integers(-9, 9, (height, width)), 0, (1 << bits) - 1).astype(np.uint16)
    pixels[1::4, 1::4] = 0
    pixels[2::5, 2::5] = (1 << bits) - 1
    return pixels


# --- a small encoder of lossless JPEG, written from ITU-T T.81 annex H: sample by sample, to be obviously right


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def predicted(pixels: Pixels, y: int, x: int, top: int, predictor: int, first: int) -> int:
    if y == top:
        return int(pixels[y, x - 1]) if x else first
    above = int(pixels[y - 1, x])
    if x == 0:
        return above
    left, corner = int(pixels[y, x - 1]), int(pixels[y - 1, x - 1])
    return {
        1: left, 2: above, 3: corner, 4: left + above - corner,
        5: left + ((above - corner) >> 1), 6: above + ((left - corner) >> 1), 7: (left + above) >> 1,
    }[predictor]  # fmt: skip


def lossless(
    pixels: Pixels, *, bits: int, predictor: int = 1, rows_per_restart: int = 0, transform: int = 0, components: int = 1
) -> bytes:
    """Encode with a code of 17 words of 5 bits, one for each size of a difference."""
    height, width = pixels.shape
    pixels = np.right_shift(pixels, transform, dtype=np.uint16)
    parts, text = [], ""
    for y in range(height):
        top = y - y % rows_per_restart if rows_per_restart else 0
        if y and y == top:
            parts.append(text)
            text = ""
        for x in range(width):
            prediction = predicted(pixels, y, x, top, predictor, 1 << (bits - transform - 1))
            difference = (int(pixels[y, x]) - prediction + 32767) % 65536 - 32767  # from -32,767 to 32,768
            size = abs(difference).bit_length() if difference != 32768 else 16
            text += f"{size:05b}"
            if 0 < size < 16:
                text += f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}"
    parts.append(text)
    coded = b""
    for number, part in enumerate(parts):
        padded = part + "1" * (-len(part) % 8)
        octets = int(padded, 2).to_bytes(len(padded) // 8)
        coded += octets.replace(b"\xff", b"\xff\x00") + (bytes([0xFF, 0xD0 + number % 8]) if part is not text else b"")
    table = segment(0xC4, bytes([0]) + bytes([0, 0, 0, 0, 17] + 11 * [0]) + bytes(range(17)))
    frame = segment(0xC3, struct.pack(">BHHB", bits, height, width, components) + components * b"\x01\x11\x00")
    restart = segment(0xDD, struct.pack(">H", rows_per_restart * width)) if rows_per_restart else b""
    scan = segment(0xDA, bytes([1, 1, 0, predictor, 0, transform]))
    return b"\xff\xd8" + frame + table + restart + scan + coded + b"\xff\xd9"


def baseline(pixels: npt.NDArray[np.uint8], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_gdcm(dataset: pydicom.Dataset, bits_allocated: int) -> npt.NDArray[np.integer]:
    """Decode with the library that is too fragile to be used on files from anywhere."""
    gdcm = pytest.importorskip("gdcm")
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(get_frame(dataset.PixelData, 0, number_of_frames=1))
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((dataset.Columns, dataset.Rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    syntax = gdcm.TransferSyntax.GetTSType(str(dataset.file_meta.TransferSyntaxUID))
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    image.SetPixelFormat(gdcm.PixelFormat(1, bits_allocated, dataset.BitsStored, dataset.BitsStored - 1, 0))
    octets = image.GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(octets, "u1" if bits_allocated == 8 else "<u2").reshape(dataset.Rows, dataset.Columns)


# --- lossless JPEG


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_every_predictor_gives_back_what_was_encoded(predictor: int, bits: int) -> None:
    pixels = noise(37, 23, bits)
    for rows in (0, 1, 5):
        decoded = _codestreams.decode_jpeg(lossless(pixels, bits=bits, predictor=predictor, rows_per_restart=rows))
        assert decoded.dtype == np.uint16
        assert np.array_equal(decoded, pixels), rows


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (64, 3)])
def test_pictures_of_one_row_or_column_are_read(shape: tuple[int, int]) -> None:
    for predictor in (1, 4, 7):
        pixels = noise(*shape, 12)
        assert np.array_equal(_codestreams.decode_jpeg(lossless(pixels, bits=12, predictor=predictor)), pixels)


def test_a_point_transform_loses_the_lowest_bits_alone() -> None:
    pixels = noise(20, 30, 12)
    assert np.array_equal(_codestreams.decode_jpeg(lossless(pixels, bits=12, transform=2)), pixels & ~np.uint16(3))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(60, 50, 16)
    monkeypatch.setattr(_codestreams, "_CHUNK_BYTES", 64)
    assert np.array_equal(_codestreams.decode_jpeg(lossless(pixels, bits=16)), pixels)
    grey = (noise(64, 80, 8) // 2).astype(np.uint8)
    whole = _codestreams.decode_jpeg(baseline(grey))
    monkeypatch.undo()
    assert np.array_equal(_codestreams.decode_jpeg(baseline(grey)), whole)


@pytest.mark.parametrize("name", ["JPEG-LL.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm", "bad_sequence.dcm"])
def test_a_real_lossless_stream_is_read_as_gdcm_reads_it(name: str) -> None:
    dataset = pydicom.dcmread(real_file(name))
    assert np.array_equal(_codestreams.decode_jpeg(stream_of(name)), by_gdcm(dataset, dataset.BitsAllocated))


# --- sequential JPEG


def test_a_real_12_bit_stream_is_read_as_gdcm_reads_it() -> None:
    decoded = _codestreams.decode_jpeg(stream_of("JPGExtended.dcm"))
    expected = by_gdcm(pydicom.dcmread(real_file("JPGExtended.dcm")), 12)
    assert decoded.max() == 264
    assert np.abs(decoded.astype(int) - expected).max() <= 1  # of 4,095: integers there, floats here


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_blocks_are_read_as_libjpeg_reads_them(options: dict[str, object]) -> None:
    rng = np.random.default_rng(3)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 14), np.uint8)).resize((101, 75), Image.Resampling.BICUBIC)
    data = baseline(np.asarray(smooth), **options)
    difference = np.abs(_codestreams.decode_jpeg(data).astype(int) - np.asarray(Image.open(io.BytesIO(data))))
    assert difference.max() <= 1  # of 255: integers there, floats here
    assert difference.mean() < 0.05


def test_progressive_colour_and_arithmetic_streams_are_refused_by_name() -> None:
    grey = noise(20, 20, 8).astype(np.uint8)
    colour = baseline(np.stack([grey, grey, grey], axis=-1))
    for data in (baseline(grey, progressive=True), colour, lossless(noise(8, 8, 8), bits=8, components=3)):
        with pytest.raises(ImageError) as caught:
            _codestreams.decode_jpeg(data)
        assert caught.value.reason == "unsupported compression"
        assert str(caught.value) in (
            "The JPEG stream is neither lossless nor sequential of one grey component; store the picture uncompressed.",
            "The JPEG stream has more than one scan; store the picture uncompressed.",
        )


# --- headers


def test_headers_of_all_families_are_read() -> None:
    grey = noise(20, 30, 8).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG2000", no_jp2=True)
    boxed = io.BytesIO()
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(boxed, "JPEG2000")
    frames = [
        _codestreams.read_frame(data)
        for data in (baseline(grey), lossless(noise(20, 30, 12), bits=12), buffer.getvalue(), boxed.getvalue())
    ]
    assert frames == [
        _codestreams.Frame(0xC0, 8, 30, 20, 1),
        _codestreams.Frame(0xC3, 12, 30, 20, 1),
        _codestreams.Frame(0x51, 8, 30, 20, 1),
        _codestreams.Frame(0x51, 8, 30, 20, 3),
    ]
    assert _codestreams.read_frame(stream_of("JPEGLSNearLossless_16.dcm")) == _codestreams.Frame(0xF7, 16, 10, 50, 1)


def test_a_jpeg_that_hides_another_header_in_a_comment_is_read_by_its_own() -> None:
    grey = noise(20, 30, 8).astype(np.uint8)
    siz = b"\xff\x4f\xff\x51" + struct.pack(">HH8LH", 41, 0, 5, 5, 0, 0, 5, 5, 0, 0, 1) + b"\x07\x01\x01"
    data = baseline(grey)
    decoy = data[:2] + segment(0xFE, siz) + data[2:]
    assert _codestreams.read_frame(decoy).width_px == 30


# --- damage


@pytest.mark.parametrize("data", [lossless(noise(30, 20, 12), bits=12), baseline(noise(40, 40, 8).astype(np.uint8))])
def test_a_cut_stream_is_never_half_a_picture(data: bytes) -> None:
    for end in range(2, len(data) - 2, 7):
        for tail in (b"", b"\xff\xd9"):  # a cut may have been sealed again
            with pytest.raises(ImageError) as caught:
                _codestreams.decode_jpeg(data[:end] + tail)
            assert caught.value.reason in ("truncated", "damaged")
            assert str(caught.value) in (
                "The JPEG stream ends before the picture does; get the file again.",
                "The JPEG stream is damaged; get the file again.",
            )


@pytest.mark.parametrize("name", ["lossless", "restarts", "blocks"])
def test_whatever_is_damaged_ends_in_pixels_or_in_an_image_error(name: str) -> None:
    data = {
        "lossless": lossless(noise(30, 20, 12), bits=12, predictor=6),
        "restarts": lossless(noise(30, 20, 16), bits=16, rows_per_restart=3),
        "blocks": baseline(noise(40, 40, 8).astype(np.uint8)),
    }[name]
    rng = np.random.default_rng(0)
    outcomes = set()
    for turn in range(600):
        damaged = bytearray(data)
        for place in rng.integers(2, len(data) if turn % 2 else 120, size=1 + turn % 3):
            damaged[place] = rng.integers(256)
        try:
            if (frame := _codestreams.read_frame(bytes(damaged))).width_px * frame.height_px < 100_000:
                _codestreams.decode_jpeg(bytes(damaged))
            outcomes.add("read")
        except ImageError as error:
            outcomes.add(error.reason)
    assert {"read", "damaged", "truncated"} <= outcomes <= {"read", "damaged", "truncated", "unsupported compression"}


# --- RLE


def test_rle_gives_back_what_pydicom_encoded() -> None:
    pixels = noise(31, 17, 16)
    pixels[5:9] = 7
    frame = get_encoder(pydicom.uid.RLELossless).encode(
        pixels, rows=31, columns=17, samples_per_pixel=1, bits_allocated=16, bits_stored=16, pixel_representation=0,
        photometric_interpretation="MONOCHROME2", number_of_frames=1,
    )  # fmt: skip
    high, low = _codestreams.decode_rle(frame, size=31 * 17, n_segments=2)
    planes = [np.frombuffer(plane, np.uint8).astype(int) for plane in (high, low)]
    assert np.array_equal(planes[0] * 256 + planes[1], pixels.reshape(-1))
    for end in range(0, len(frame) - 2, 11):
        with pytest.raises(ImageError, match=r"The RLE data (are damaged|end before the picture does); get the file"):
            _codestreams.decode_rle(frame[:end], size=31 * 17, n_segments=2)


def test_rle_makes_no_more_than_the_picture_whatever_it_holds() -> None:
    bomb = struct.pack("<2L", 1, 64).ljust(64, b"\0") + b"\x81\x07" * 500_000  # 64 million bytes
    tracemalloc.start()
    try:
        assert _codestreams.decode_rle(bomb, size=100, n_segments=1) == [b"\x07" * 100]
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()
