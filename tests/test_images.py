"""Bytes to grey pixels: every format that is read, every file that is refused, and how exact the quick way is."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, PngImagePlugin

from pneumoscope import images
from pneumoscope.errors import ImageError

Pixels = npt.NDArray[np.uint8]


def scene(height: int = 60, width: int = 80) -> Pixels:
    """Return a picture without symmetry: a tilted ramp with a bright corner."""
    y, x = np.mgrid[:height, :width]
    ramp = np.round(200 * (0.7 * x / width + 0.3 * y / height))
    ramp[: height // 4, : width // 4] = 255
    return np.asarray(ramp, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(data: bytes) -> ImageError:
    """Return the error that both ways of reading a file end in."""
    with pytest.raises(ImageError) as by_header:
        images.read_header(data)
    with pytest.raises(ImageError) as by_decoding:
        images.decode(data)
    assert (by_header.value.reason, str(by_header.value)) == (by_decoding.value.reason, str(by_decoding.value))
    return by_header.value


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black_png(width: int, height: int) -> bytes:
    """Return a whole, valid PNG of black pixels, made row by row so that it never stands in memory unpacked."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)  # one bit a pixel
    body = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def npy(array: npt.NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# --- what is read, and what it means


def test_grey_png_is_read_exactly() -> None:
    data = encoded(Image.fromarray(scene()))
    assert np.array_equal(images.decode(data), scene())
    assert images.decode(data).dtype == np.uint8
    assert images.read_header(data) == images.Header("PNG", width_px=80, height_px=60, frames=1)


def test_grey_jpeg_is_read_nearly_exactly() -> None:
    data = encoded(Image.fromarray(scene()), "JPEG", quality=95)
    assert np.abs(images.decode(data).astype(int) - scene()).mean() < 1
    assert images.read_header(data) == images.Header("JPEG", width_px=80, height_px=60, frames=1)


def test_equal_channels_give_the_grey_they_hold() -> None:
    assert np.array_equal(images.decode(encoded(Image.fromarray(scene()).convert("RGB"))), scene())


def test_colour_becomes_luma() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert images.decode(encoded(Image.fromarray(colours))).tolist() == [[76, 150, 29, 255]]  # 0.299 0.587 0.114


def test_cmyk_jpeg_is_black_where_the_ink_is() -> None:
    inks = Image.fromarray(255 - scene()).convert("L")
    none = Image.new("L", inks.size, 0)
    data = encoded(Image.merge("CMYK", (none, none, none, inks)), "JPEG", quality=95)
    assert np.abs(images.decode(data).astype(int) - scene()).mean() < 2


def test_16_bit_png_is_divided_by_257() -> None:
    wide = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    assert images.decode(encoded(Image.fromarray(wide))).tolist() == [[0, 0, 1, 128, 255]]


def test_palette_png_shows_the_colours_not_the_indices() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 200, 200, 10, 10, 10])
    image.putdata([0, 1])
    assert images.decode(encoded(image)).tolist() == [[200, 10]]


def test_one_bit_png_is_black_and_white() -> None:
    image = Image.fromarray(scene() > 100)
    assert np.array_equal(images.decode(encoded(image)), (scene() > 100) * 255)


def test_what_is_transparent_is_black() -> None:
    data = encoded(Image.merge("LA", (Image.new("L", (2, 1), 200), Image.fromarray(np.array([[0, 255]], np.uint8)))))
    assert images.decode(data).tolist() == [[0, 200]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 200, 200, 100, 100, 100])
    palette.putdata([0, 1])
    assert images.decode(encoded(palette, transparency=0)).tolist() == [[0, 100]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (3, np.rot90(scene(), 2)),
        (6, np.rot90(scene(), -1)),  # the camera stood on its right side
        (8, np.rot90(scene(), 1)),
        (2, np.fliplr(scene())),
    ],
)
def test_exif_orientation_is_applied(kind: str, orientation: int, turned: Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"quality": 95} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(scene()), kind, exif=exif, **options)
    assert images.decode(data).shape == turned.shape
    assert np.abs(images.decode(data).astype(int) - turned).mean() < 1
    header = images.read_header(data)
    assert (header.height_px, header.width_px) == turned.shape


@pytest.mark.parametrize("kind", ["PNG", "MPO"])
def test_of_several_pages_the_first_is_read_and_all_are_counted(kind: str) -> None:
    first, second = Image.new("L", (40, 30), 50), Image.new("L", (40, 30), 200)
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert set(images.decode(data).ravel()) == {50}
    assert images.read_header(data) == images.Header("PNG" if kind == "PNG" else "JPEG", 40, 30, frames=2)


def test_a_row_of_an_array_archive_is_read() -> None:
    for array in (scene(), scene()[:, :, None], np.asfortranarray(scene())):
        assert np.array_equal(images.decode(npy(array)), scene())
    assert images.read_header(npy(scene())) == images.Header("NPY", width_px=80, height_px=60, frames=1)


def test_the_name_says_nothing_and_the_bytes_everything(tmp_path: Path) -> None:
    path = tmp_path / "person1_virus_1.jpeg"
    path.write_bytes(encoded(Image.fromarray(scene())))
    assert images.read_header(path.read_bytes()).format == "PNG"


def test_damaged_exif_data_do_not_matter_and_nobody_is_warned() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x05\0\0\0\x1a"
    data = encoded(Image.fromarray(scene()), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.decode(data).shape == (60, 80)
        assert images.read_header(data).width_px == 80


def test_a_picture_is_turned_even_where_other_exif_data_are_of_the_wrong_type() -> None:
    entries = struct.pack(">HHLL", 0x010F, 5, 1, 38) + struct.pack(">HHLHH", 0x0112, 3, 1, 6, 0)  # Make as a fraction
    exif = b"Exif\0\0MM\0*" + struct.pack(">LH", 8, 2) + entries + bytes(4) + struct.pack(">LL", 1, 3)
    data = encoded(Image.fromarray(scene()), "JPEG", exif=exif, quality=95)
    assert images.decode(data).shape == (80, 60)
    assert images.read_header(data).width_px == 60


def test_the_header_of_a_png_is_read_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = black_png(3000, 3000)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("a pixel was decoded"))
    assert images.read_header(data).width_px == 3000


# --- what is refused


@pytest.mark.parametrize(
    ("data", "reason", "sentence"),
    [
        (b"", "empty file", "The file holds 0 bytes."),
        (
            b"<html>not found</html>",
            "not an image",
            "The file's content is not an image; JPEG, PNG and DICOM are read.",
        ),
        (b"%PDF-1.7 ...", "unsupported format PDF", "The file is PDF; JPEG, PNG and DICOM are read."),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0",
            "unsupported format PostScript",
            "The file is PostScript; JPEG, PNG and DICOM are read.",
        ),
        (
            b"MZ\x90\x00",
            "unsupported format Windows program",
            "The file is Windows program; JPEG, PNG and DICOM are read.",
        ),
        (
            b"\x7fELF\x02",
            "unsupported format Linux program",
            "The file is Linux program; JPEG, PNG and DICOM are read.",
        ),
        (bytes(128) + b"DICM", "no pixels", "The DICOM file holds no pixels; export it with its picture."),
        (b"\xff\xd8\xff\xe0", "damaged", "The file begins like a JPEG or PNG but its header is damaged."),
        (b"\x89PNG\r\n\x1a\n", "damaged", "The file begins like a JPEG or PNG but its header is damaged."),
    ],
    ids=["empty", "html", "pdf", "eps", "pe", "elf", "dicom", "jpeg magic", "png magic"],
)
def test_what_is_not_an_image_is_named(data: bytes, reason: str, sentence: str) -> None:
    error = refused(data)
    assert (error.reason, str(error)) == (reason, sentence)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "EPS"])
def test_formats_that_pillow_could_read_are_refused_by_name(kind: str) -> None:
    name = {"WEBP": "WebP", "EPS": "PostScript"}.get(kind, kind)
    assert refused(encoded(Image.fromarray(scene()), kind)).reason == f"unsupported format {name}"


def test_a_png_bomb_is_refused_before_a_pixel_is_decoded() -> None:
    data = black_png(30_000, 30_000)
    assert len(data) < 1_000_000
    tracemalloc.start()
    try:
        error = refused(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.reason == "too large"
    assert str(error).startswith("The picture is over 100,000,000 pixels by far (Image size (900000000 pixels) exceeds")
    assert peak < 10 * len(data)


def test_a_large_png_is_refused_with_its_size() -> None:
    error = refused(black_png(12_000, 10_000))
    assert (error.reason, str(error)) == (
        "too large",
        "The picture is 12000 x 10000 pixels; at most 100,000,000 pixels are decoded.",
    )


def test_the_bomb_maker_makes_pictures() -> None:
    assert np.array_equal(images.decode(black_png(33, 21)), np.zeros((21, 33)))


@pytest.mark.parametrize(("width", "height"), [(41, 2), (2, 41)])
def test_a_ribbon_is_not_a_picture(width: int, height: int) -> None:
    error = refused(black_png(width, height))
    assert (error.reason, str(error)) == (
        "not a picture's shape",
        f"The picture is {width} x {height} pixels; one side is over 20 times the other.",
    )
    assert images.decode(black_png(40, 2)).shape == (2, 40)


def cuts(data: bytes, count: int) -> Iterator[bytes]:
    for end in np.linspace(4, len(data) - 1, count).astype(int):
        yield data[:end]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("at_least_px", [None, 40])
def test_a_truncated_jpeg_is_never_half_grey(progressive: bool, at_least_px: int | None) -> None:
    data = encoded(Image.fromarray(scene(300, 400)), "JPEG", progressive=progressive)
    whole = images.decode(data, at_least_px=at_least_px)
    short = [*cuts(data, 150), *(data[:-n] for n in range(1, 40))]
    filled = [cut + bytes(len(data) - len(cut)) for cut in cuts(data, 50)]  # as a download leaves that was cut off
    outcomes = []
    for cut in short + filled:
        try:
            assert np.array_equal(images.decode(cut, at_least_px=at_least_px), whole)
            outcomes.append("whole")  # only the end marker was missing
        except ImageError as error:
            outcomes.append(error.reason)
    assert set(outcomes) <= {"truncated", "damaged", "whole"}
    assert outcomes.count("whole") < 5


def test_a_truncated_photograph_says_so(real_data: Path) -> None:
    data = (real_data / "full_resolution" / "NORMAL" / "IM-0297-0001.jpeg").read_bytes()
    with pytest.raises(ImageError, match=r"^The picture's data are truncated \(.*\)\.$") as caught:
        images.load(data[: len(data) // 2], 224)
    assert caught.value.reason == "truncated"


def test_a_truncated_png_is_refused() -> None:
    data = encoded(Image.fromarray(scene(100, 100)))
    for cut in cuts(data[: data.index(b"IEND") - 20], 60):  # without the last bytes of the pixels
        with pytest.raises(ImageError) as caught:
            images.decode(cut)
        assert caught.value.reason in ("truncated", "damaged", "not an image")


def test_a_png_with_a_flipped_bit_is_refused() -> None:
    data = bytearray(encoded(Image.fromarray(scene())))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(ImageError) as caught:
        images.decode(bytes(data))
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_whatever_is_damaged_ends_in_pixels_or_in_an_image_error(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "words"
    data = encoded(Image.fromarray(scene(40, 50)), kind, exif=exif)
    rng = np.random.default_rng(0)
    outcomes = set()
    for turn in range(400):
        damaged = bytearray(data)
        for place in rng.integers(8, len(data) if turn % 2 else 150, size=3):
            damaged[place] = rng.integers(256)
        for read in (images.read_header, images.decode):
            try:
                read(bytes(damaged))
                outcomes.add("read")
            except ImageError as error:
                outcomes.add(error.reason)
    assert {"read", "damaged"} <= outcomes


@pytest.mark.parametrize(
    ("data", "reason", "sentence"),
    [
        (npy(scene())[:-5], "damaged", "The array cannot be read ("),
        (npy(scene())[:20], "damaged", "The array cannot be read ("),
        (npy(np.array([["a"]], dtype=object)), "not an image", "The array is object of shape (1, 1); uint8 of shape"),
        (
            npy(scene().astype(np.uint16)),
            "not an image",
            "The array is uint16 of shape (60, 80); uint8 of shape (H, W)",
        ),
        (npy(np.zeros((2, 2, 3), np.uint8)), "not an image", "The array is uint8 of shape (2, 2, 3); uint8 of shape"),
        (
            npy(np.zeros((0, 9), np.uint8)),
            "not an image",
            "The array is uint8 of shape (0, 9); uint8 of shape (H, W) was",
        ),
        (
            npy(np.zeros((1, 99), np.uint8)),
            "not a picture's shape",
            "The picture is 99 x 1 pixels; one side is over 20",
        ),
    ],
)
def test_an_array_that_is_no_picture_is_refused(data: bytes, reason: str, sentence: str) -> None:
    error = refused(data)
    assert error.reason == reason
    assert str(error).startswith(sentence)


@pytest.mark.parametrize(
    "words", ["{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2), ", "-" * 9000, "(" * 250, "-" * 250 + "1"]
)
def test_an_array_whose_header_is_no_dictionary_is_refused(words: str) -> None:
    assert refused(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words.encode()).reason == "damaged"


def test_a_jpeg_of_very_many_scans_is_refused_before_they_are_decoded() -> None:
    data = encoded(Image.fromarray(scene()), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    for times, outcome in ((80, None), (100, "damaged")):  # beside the picture's own, ten or so
        bomb = data[:-2] + times * last + data[-2:]
        if outcome is None:
            assert images.decode(bomb).shape == (60, 80)
        else:
            assert refused(bomb).reason == outcome
            assert str(refused(bomb)).startswith("The JPEG has over 100 scans, or over 10,000 segments; no more are")


def test_a_jpeg_with_what_looks_like_scans_beside_the_picture_is_decoded() -> None:
    data = encoded(Image.fromarray(scene()), "JPEG", progressive=True)
    rng = np.random.default_rng(0)
    noise = rng.bytes(20_000).join([b"\xff\xda"] * 200)  # as in a video, some MB long
    comment = b"\xff\xeb\xea\x62" + 60_000 // 2 * b"\xff\xda"  # a segment of a maker's own
    for whole in (data + noise, data[:2] + comment + data[2:]):
        assert (images.decode(whole) == images.decode(data)).all()
        assert images.read_header(whole) == images.read_header(data)


def test_a_jpeg_of_endless_segments_is_refused_before_they_are_all_followed() -> None:
    data = encoded(Image.fromarray(scene()), "JPEG")
    assert refused(data[:2] + 20_000 * b"\xff\xfe\x00\x02" + data[2:] + 101 * b"\xff\xda").reason == "damaged"


@pytest.mark.parametrize("between", [b"\xff\x01", b"\xff\x02\xff\xff", b"garbage", b"\xff\xff", b"\xff\xfe\x00\x02"])
def test_scans_are_counted_whatever_stands_between_them(between: bytes) -> None:
    data = encoded(Image.fromarray(scene()), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert refused(data[:-2] + 100 * (between + last) + data[-2:]).reason == "damaged"


def test_an_array_that_claims_to_be_huge_takes_no_memory() -> None:
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10_000_000, 1_000_000)}
    np.lib.format.write_array_header_1_0(header, claim)
    assert refused(header.getvalue()).reason == "too large"


# --- resizing


def test_resizing_is_antialiased() -> None:
    y, x = np.mgrid[:1000, :1000]
    for period in (1, 2, 3):  # finer than the result can show: flat grey is the truth, bands would be invented
        board = ((x // period + y // period) % 2 * 255).astype(np.uint8)
        small = images.resize(board, 90)
        assert small.shape == (90, 90)
        assert np.abs(small[3:-3, 3:-3].astype(int) - 127.5).max() < 12, period


def test_resizing_squashes_both_sides() -> None:
    small = images.resize(scene(600, 800), 100)
    assert np.abs(small.astype(int) - images.resize(scene(1200, 1000), 100)).mean() < 1
    assert images.resize(scene(10, 20), 64).shape == (64, 64)


def test_a_picture_of_the_right_size_is_untouched() -> None:
    assert np.array_equal(images.resize(scene(64, 64), 64), scene(64, 64))


# --- the quick way to a JPEG


def full_resolution(real_data: Path) -> list[Path]:
    files = sorted((real_data / "full_resolution").glob("*/*.jpeg"))
    assert files
    return files[::6]


def test_decoding_at_a_part_of_the_size_changes_next_to_nothing(real_data: Path) -> None:
    differences = []
    scaled = 0
    for path in full_resolution(real_data):
        data = path.read_bytes()
        whole = images.decode(data)
        part = images.decode(data, at_least_px=448)
        assert min(part.shape) >= min(448, *whole.shape)
        scaled += part.size < whole.size
        quick = images.load(data, 224)
        differences.append(np.abs(quick.astype(int) - images.resize(whole, 224)).mean())
    assert scaled >= 5
    assert max(differences) < 1.0, differences  # of 255


def test_decoding_is_deterministic(real_data: Path) -> None:
    for path in full_resolution(real_data)[:4]:
        data = path.read_bytes()
        assert np.array_equal(images.load(data, 224), images.load(data, 224))


def test_a_small_jpeg_is_decoded_whole() -> None:
    data = encoded(Image.fromarray(scene(300, 400)), "JPEG")
    assert images.decode(data, at_least_px=448).shape == (300, 400)
    assert images.decode(data, at_least_px=150).shape == (150, 200)
    assert images.load(data, 64).shape == (64, 64)


def test_compressed_images_carry_the_traces_of_a_jpeg_and_doing_it_again_adds_next_to_nothing() -> None:
    square = images.load(encoded(Image.fromarray(scene(600, 800))), 64)
    once = images.load(encoded(Image.fromarray(scene(600, 800))), 64, jpeg_quality=50)
    assert np.array_equal(once, images.compressed(square, 50))
    assert once.shape == (64, 64)
    assert once.dtype == np.uint8
    first, second = (np.abs(a.astype(int) - b).mean() for a, b in ((once, square), (images.compressed(once, 50), once)))
    assert first > 0.2
    assert second < first / 4
