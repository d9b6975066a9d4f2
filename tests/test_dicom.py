"""DICOM in: real radiographs, every way of storing and showing them, what is refused, and that no name leaks."""

from __future__ import annotations

import io
import logging
import struct
import threading
import traceback
import tracemalloc
import warnings
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pydicom.config
import pydicom.uid
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from pneumoscope import dicom, images
from pneumoscope.catalog import Catalog
from pneumoscope.errors import ImageError
from pneumoscope.store import ImageStore

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
SECRET = "ZWETSCHGE"  # stands in every element about the patient, and in no sentence of ours
CR, DX, RAW_DX, SC = dicom._KINDS[:4]
Grey = npt.NDArray[np.uint8]


def real_file(name: str) -> Path:
    """Return a file of pydicom or of pydicom-data; `pydicom.data` would look for missing ones on the network."""
    spec = find_spec("data_store")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / name
    return path if path.exists() else BUNDLED / name


def real(name: str, **elements: Any) -> bytes:
    """Return a real file's bytes, with elements changed where given (its pixels stay as they are coded)."""
    data = real_file(name).read_bytes()
    if not elements:
        return data
    dataset = pydicom.dcmread(io.BytesIO(data))
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return written(dataset)


def written(dataset: Dataset, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")  # some of these files are wrong on purpose
        dataset.save_as(buffer, **options)
    return buffer.getvalue()


def ramp(bits: int = 12, *, signed: bool = False, height: int = 24, width: int = 32) -> npt.NDArray[Any]:
    """Return stored values from the lowest to the highest, without symmetry."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    values = np.linspace(low, high, height * width).reshape(height, width)
    kind = f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}"
    return np.round(values).astype(kind)


def dataset_of(pixels: npt.NDArray[Any], *, bits: int = 12, syntax: str = "", **elements: Any) -> Dataset:
    """Return a chest radiograph; `elements` are added, or taken away where None."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax or pydicom.uid.ExplicitVRLittleEndian)
    values: dict[str, Any] = {
        "SOPClassUID": CR, "SOPInstanceUID": "1.2.3", "Modality": "CR", "BodyPartExamined": "CHEST",
        "PatientName": f"{SECRET}^ANNA", "PatientID": SECRET, "PatientComments": SECRET, "StudyDescription": SECRET,
        "PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1, "PlanarConfiguration": None,
        "Rows": pixels.shape[0], "Columns": pixels.shape[1], "BitsAllocated": 8 * pixels.itemsize, "BitsStored": bits,
        "HighBit": bits - 1, "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "WindowCenter": 1 << (bits - 1), "WindowWidth": 1 << bits, "PixelData": pixels.tobytes(),
    }  # fmt: skip
    with pydicom.config.disable_value_validation():
        for keyword, value in (values | elements).items():
            if value is not None:
                setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    return dataset


def film(pixels: npt.NDArray[Any] | None = None, **options: Any) -> bytes:
    """Return a file as `dataset_of` describes it."""
    return written(dataset_of(ramp() if pixels is None else pixels, **options), enforce_file_format=True)


def refused(data: bytes) -> ImageError:
    """Return the error that both ways of reading a file end in."""
    with pytest.raises(ImageError) as by_header:
        images.read_header(data)
    with pytest.raises(ImageError) as by_decoding:
        images.decode(data)
    assert (by_header.value.reason, str(by_header.value)) == (by_decoding.value.reason, str(by_decoding.value))
    assert SECRET not in "".join(traceback.format_exception(by_decoding.value))
    return by_header.value


def shown_by_pydicom(dataset: Dataset) -> npt.NDArray[np.float64]:
    """Return greys from 0 to 255 as pydicom's own steps give them: an independent way to the same picture."""
    stored = dataset.pixel_array
    with np.errstate(over="ignore"):  # a sigmoid far from its centre
        values = apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype(np.float64)
    low, high = 0.0, 2.0**dataset.BitsStored - 1
    if dataset.PixelRepresentation:
        low, high = -(2.0 ** (dataset.BitsStored - 1)), 2.0 ** (dataset.BitsStored - 1) - 1
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        if name in dataset:
            low, high = 0.0, 2.0 ** dataset[name][0].LUTDescriptor[2] - 1
    if "RescaleSlope" in dataset and "VOILUTSequence" not in dataset:
        low, high = (end * dataset.RescaleSlope + dataset.RescaleIntercept for end in (low, high))
    greys: npt.NDArray[np.float64] = 255 * (values - low) / (high - low)
    return 255 - greys if dataset.PhotometricInterpretation == "MONOCHROME1" else greys


def assert_shown_as_by_pydicom(data: bytes) -> None:
    expected = shown_by_pydicom(pydicom.dcmread(io.BytesIO(data)))
    assert np.abs(images.decode(data) - expected).max() <= 0.5 + 1e-6  # what rounding to whole greys allows


# --- real radiographs


@pytest.mark.parametrize("name", ["RG1", "RG3"])
def test_a_real_radiograph_is_the_same_however_it_is_stored(name: str) -> None:
    plain = images.decode(real(f"{name}_UNCR.dcm"))
    assert np.array_equal(images.decode(real(f"{name}_J2KR.dcm")), plain)  # lossless
    lossy = images.decode(real(f"{name}_J2KI.dcm"))
    assert np.array_equal(images.decode(real(f"{name}_UNCI.dcm")), lossy)  # the lossy one, decompressed by its makers
    difference = np.abs(lossy.astype(int) - plain)
    assert difference.max() <= 3
    assert difference.mean() < 0.5


@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG3_UNCR.dcm", "vlut_04.dcm"])
def test_a_real_picture_is_shown_as_pydicom_would(name: str) -> None:
    assert_shown_as_by_pydicom(real(name))


def test_a_real_modality_table_is_applied() -> None:
    data = real("mlut_18.dcm", WindowCenter=2048, WindowWidth=4096)
    assert_shown_as_by_pydicom(data)
    assert images.read_header(real("mlut_18.dcm")).notes == (dicom.NO_WINDOW,)


def test_lungs_are_dark_and_bones_are_bright() -> None:
    chest = images.load(real("RG1_UNCR.dcm"), 224).astype(int)
    lung, spine = chest[70:100, 40:60], chest[60:100, 105:115]
    assert lung.mean() + 60 < spine.mean()
    leg = images.load(real("RG3_UNCR.dcm"), 224).astype(int)
    air, bone = leg[40:80, 60:75], leg[50:120, 104:111]
    assert air.mean() + 100 < bone.mean()


def test_headers_of_real_files() -> None:
    assert images.read_header(real("RG1_J2KR.dcm")) == images.Header("DICOM", width_px=1841, height_px=1955, frames=1)
    assert images.read_header(real("RG3_J2KI.dcm")).notes == (dicom.NOT_CHEST,)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("JPEG-LL.dcm", {"Modality": "OT"}),
        ("JPGLosslessP14SV1_1s_1f_8b.dcm", {"SOPClassUID": DX, "Modality": "DX"}),
        ("bad_sequence.dcm", {"SOPClassUID": DX, "Modality": "DX"}),
        ("JPGExtended.dcm", {"Modality": "OT", "WindowCenter": 130, "WindowWidth": 260}),
        ("MR_small_RLE.dcm", {"SOPClassUID": CR, "Modality": "CR"}),
        ("MR_small_jpeg_ls_lossless.dcm", {"SOPClassUID": CR, "Modality": "CR"}),
        ("MR_small_jp2klossless.dcm", {"SOPClassUID": CR, "Modality": "CR"}),
        ("MR_small_padded.dcm", {"SOPClassUID": CR, "Modality": "CR"}),
        ("J2K_pixelrep_mismatch.dcm", {"SOPClassUID": CR, "Modality": "CR"}),
    ],
)
def test_real_compressed_files_of_other_kinds_are_read_once_they_claim_to_be_radiographs(
    name: str, elements: dict[str, Any]
) -> None:
    header = images.read_header(real(name, **elements))
    pixels = images.decode(real(name, **elements))
    assert pixels.shape == (header.height_px, header.width_px)
    assert len(np.unique(pixels)) > 50
    assert refused(real(name)).reason == "not a radiograph"


@pytest.mark.parametrize("compressed", ["MR_small_RLE", "MR_small_jpeg_ls_lossless", "MR_small_jp2klossless"])
def test_a_real_file_compressed_without_loss_gives_the_same_picture(compressed: str) -> None:
    elements = {"SOPClassUID": CR, "Modality": "CR"}
    plain = images.decode(real("MR_small.dcm", **elements))
    assert np.array_equal(images.decode(real(f"{compressed}.dcm", **elements)), plain)
    for other in ("MR_small_implicit", "MR_small_bigendian", "MR_small_padded"):
        assert np.array_equal(images.decode(real(f"{other}.dcm", **elements)), plain), other


def test_real_colour_captures_become_luma_however_they_are_stored() -> None:
    plain = images.decode(real("SC_rgb.dcm"))
    rgb = pydicom.dcmread(real_file("SC_rgb.dcm")).pixel_array
    assert np.array_equal(plain, np.asarray(Image.fromarray(rgb).convert("L")))
    for same in ("SC_rgb_rle", "SC_rgb_expb", "SC_rgb_gdcm2k_uncompressed"):
        assert np.array_equal(images.decode(real(f"{same}.dcm")), plain), same
    for near in (
        "SC_ybr_full_uncompressed",
        "SC_ybr_full_422_uncompressed",
        "SC_rgb_dcmtk_+eb+cr",
        "SC_rgb_jpeg_dcmtk",
    ):
        assert np.abs(images.decode(real(f"{near}.dcm")).astype(int) - plain).max() <= 6, near


def test_the_deflated_file_is_read() -> None:
    data = real("image_dfl.dcm")
    assert np.array_equal(images.decode(data), pydicom.dcmread(io.BytesIO(data)).pixel_array)


# --- every depth, sign and way of storing


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(8, 17))
def test_every_depth_is_shown_as_pydicom_would(bits: int, signed: bool) -> None:
    pixels = ramp(bits, signed=signed)
    center, width = (0 if signed else 1 << (bits - 1)) + 3, (1 << bits) // 3
    for space in ("MONOCHROME1", "MONOCHROME2"):
        data = film(pixels, bits=bits, PhotometricInterpretation=space, WindowCenter=center, WindowWidth=width)
        assert_shown_as_by_pydicom(data)
        assert images.read_header(data).notes == ()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("rescale", [(None, None), (1, -1024), (2.5, -300)])
def test_every_window_is_applied_after_the_rescale(
    function: str | None, rescale: tuple[float | None, float | None]
) -> None:
    slope, intercept = rescale
    for center, width in ((500, 300.5), (40, 1), (1000.25, 4000)):
        data = film(
            WindowCenter=center, WindowWidth=width, VOILUTFunction=function, RescaleSlope=slope,
            RescaleIntercept=intercept, PhotometricInterpretation="MONOCHROME1",
        )  # fmt: skip
        assert_shown_as_by_pydicom(data)


def test_a_negative_slope_turns_the_picture_round() -> None:
    window: dict[str, Any] = {"WindowCenter": 100, "WindowWidth": 150}
    turned = images.decode(film(RescaleSlope=-1, RescaleIntercept=4095, **window))
    assert np.array_equal(turned, images.decode(film((4095 - ramp()).astype(np.uint16), **window)))


def test_monochrome1_is_monochrome2_turned_round() -> None:
    plain = images.decode(film(WindowCenter=900, WindowWidth=700))
    ways: tuple[dict[str, Any], ...] = (
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
    )
    for elements in ways:
        assert np.array_equal(images.decode(film(WindowCenter=900, WindowWidth=700, **elements)), 255 - plain)
    both = film(
        WindowCenter=900, WindowWidth=700, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"
    )  # fmt: skip
    assert np.array_equal(images.decode(both), 255 - plain)  # they say the same thing twice
    assert images.read_header(both).notes == ()
    assert images.read_header(film(PresentationLUTShape="INVERSE")).notes == (dicom.CONTRADICTION,)


def test_the_first_of_several_windows_counts() -> None:
    several = film(WindowCenter=[900, 100], WindowWidth=[700, 5])
    assert np.array_equal(images.decode(several), images.decode(film(WindowCenter=900, WindowWidth=700)))


def lut(table: list[int] | bytes, *, entries: int, first: int, bits: int, vr: str = "OW") -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [entries, first, bits])
    item.add_new(
        "LUTData", vr, table if vr == "US" or isinstance(table, bytes) else struct.pack(f"<{len(table)}H", *table)
    )
    return [item]


def test_lookup_tables_are_applied_and_come_before_windows() -> None:
    curve = [int(4095 * (at / 1000) ** 2) for at in range(1001)]
    for vr in ("OW", "US"):
        data = film(VOILUTSequence=lut(curve, entries=1001, first=500, bits=12, vr=vr), WindowCenter=7, WindowWidth=9)
        assert_shown_as_by_pydicom(data)
    sixteen = [16 * value for value in curve]  # pydicom takes 8 and 16 bits only
    window: dict[str, Any] = {"WindowCenter": 20000, "WindowWidth": 30000}
    assert_shown_as_by_pydicom(film(ModalityLUTSequence=lut(sixteen, entries=1001, first=500, bits=16), **window))


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_tables_are_read_in_every_byte_order(syntax: str) -> None:
    curve = [int(255 * at / 1000) for at in range(1001)]
    expected = images.decode(film(VOILUTSequence=lut(curve, entries=1001, first=5, bits=8)))
    order = ">" if syntax == "ExplicitVRBigEndian" else "<"
    dataset = dataset_of(ramp().astype(f"{order}u2"), syntax=getattr(pydicom.uid, syntax))
    dataset.VOILUTSequence = lut(struct.pack(f"{order}1001H", *curve), entries=1001, first=5, bits=8)
    assert np.array_equal(images.decode(written(dataset, enforce_file_format=True)), expected)
    packed = bytes(curve) + b"\0"  # eight bits an entry, two in a word
    if order == "<":
        dataset.VOILUTSequence = lut(packed, entries=1001, first=5, bits=8)
        assert np.array_equal(images.decode(written(dataset, enforce_file_format=True)), expected)


def test_a_table_of_65536_entries_and_one_that_starts_below_zero() -> None:
    pixels = ramp(16, signed=True)
    table = [at >> 8 for at in range(65536)]
    for first in (-32768, 32768):  # the second is the first one, written as if it were unsigned
        sequence = lut(table, entries=0, first=first, bits=8)
        shown = images.decode(film(pixels, bits=16, VOILUTSequence=sequence))
        assert np.array_equal(shown, (pixels.astype(int) + 32768) >> 8)


def test_a_table_that_is_shorter_than_it_says_is_damage() -> None:
    error = refused(film(VOILUTSequence=lut([1, 2, 3], entries=1001, first=0, bits=12)))
    assert (error.reason, str(error)) == ("damaged", "The DICOM file is damaged; get it again.")


def test_a_length_that_looks_like_a_type_is_a_length_where_types_are_implicit() -> None:
    pixels = ramp(height=70, width=145)
    assert pixels.nbytes.to_bytes(4, "little") == b"LO\0\0"
    data = film(pixels, syntax=pydicom.uid.ImplicitVRLittleEndian)
    assert np.array_equal(images.decode(data), images.decode(film(pixels)))


def test_unused_bits_do_not_count() -> None:
    pixels = ramp(10)
    overlaid = pixels | np.uint16(0x8400)  # old files hide graphics there
    assert np.array_equal(images.decode(film(overlaid, bits=10)), images.decode(film(pixels, bits=10)))


def compressed(syntax: str, pixels: npt.NDArray[Any], stream: bytes | None = None, **elements: Any) -> bytes:
    dataset = dataset_of(pixels, **elements)
    if stream is None:
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        dataset.PixelData = encapsulate([stream])
    return written(dataset, enforce_file_format=True)


def coded(pixels: npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_compression_without_loss_changes_nothing(bits: int) -> None:
    pixels = ramp(bits)
    plain = images.decode(film(pixels, bits=bits))
    assert np.array_equal(images.decode(compressed(pydicom.uid.RLELossless, pixels, bits=bits)), plain)
    assert np.array_equal(images.decode(compressed(pydicom.uid.JPEGLSLossless, pixels, bits=bits)), plain)
    if bits in (8, 16):  # Pillow writes no other depths
        stream = coded(pixels, "JPEG2000", no_jp2=True, irreversible=False)
        data = compressed(pydicom.uid.JPEG2000Lossless, pixels, stream, bits=bits)
        assert np.array_equal(images.decode(data), plain)
    deflated = film(pixels, bits=bits, syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    assert np.array_equal(images.decode(deflated), plain)


def test_baseline_jpeg_is_nearly_the_same() -> None:
    pixels = ramp(8, height=60, width=80)
    plain = images.decode(film(pixels, bits=8)).astype(int)
    stream = coded(pixels, "JPEG", quality=95)
    for syntax in (pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit):
        assert np.abs(images.decode(compressed(syntax, pixels, stream, bits=8)) - plain).max() <= 3


def test_a_compressed_picture_in_several_fragments_is_read() -> None:
    pixels = ramp(8)
    stream = coded(pixels, "JPEG2000", no_jp2=True, irreversible=False)
    dataset = dataset_of(pixels, bits=8)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = encapsulate([stream], fragments_per_frame=3)
    assert np.array_equal(
        images.decode(written(dataset, enforce_file_format=True)), images.decode(film(pixels, bits=8))
    )


# --- padding, and files without a window


def test_padding_is_black_and_bends_no_greys() -> None:
    pixels = ramp().copy()
    picture = images.decode(film(pixels, WindowCenter=None, WindowWidth=None))
    framed = np.full((40, 50), 4000, np.uint16)
    framed[5:29, 7:39] = np.where(pixels >= 4000, 3999, pixels)
    for space in ("MONOCHROME1", "MONOCHROME2"):
        data = film(
            framed, PixelPaddingValue=4000, PhotometricInterpretation=space, WindowCenter=None, WindowWidth=None
        )  # fmt: skip
        shown = images.decode(data)
        outside = np.ones(framed.shape, bool)
        outside[5:29, 7:39] = False
        assert not shown[outside].any()
        inside = shown[~outside].reshape(pixels.shape).astype(int)
        expected = picture if space == "MONOCHROME2" else 255 - picture
        assert np.abs(inside - expected)[pixels < 3900].max() <= 6
    ranged = film(framed, PixelPaddingValue=3990, PixelPaddingRangeLimit=4010)
    assert not images.decode(ranged)[framed >= 3990].any()
    assert images.decode(ranged)[(framed > 3000) & (framed < 3990)].all()


def test_padding_of_signed_pixels_is_understood_in_both_spellings() -> None:
    pixels = ramp(16, signed=True).copy()
    pixels[:3] = -2000
    window: dict[str, Any] = {"WindowCenter": -2000, "WindowWidth": 50000}
    spelt = dataset_of(pixels, bits=16, **window)
    spelt.add_new("PixelPaddingValue", "SS", -2000)
    misspelt = dataset_of(pixels, bits=16, **window)
    misspelt.add_new("PixelPaddingValue", "US", 63536)
    plain = images.decode(film(pixels, bits=16, **window))
    assert plain[0, 0] == 128
    for dataset in (spelt, misspelt):
        shown = images.decode(written(dataset, enforce_file_format=True))
        assert not shown[:3].any()
        assert np.array_equal(shown[3:], np.where(pixels == -2000, 0, plain)[3:])


def test_padding_has_no_part_in_the_percentiles() -> None:
    pixels = np.clip(np.random.default_rng(0).normal(1500, 200, (60, 80)), 900, 4095).astype(np.uint16)
    bare: dict[str, Any] = {"WindowCenter": None, "WindowWidth": None}
    picture = images.decode(film(pixels, **bare))
    framed = np.zeros((60, 200), np.uint16)
    framed[:, :80] = pixels
    shown = images.decode(film(framed, PixelPaddingValue=0, **bare))
    assert np.array_equal(shown[:, :80], picture)
    assert not shown[:, 80:].any()


@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": -2, "RescaleIntercept": 7}])
def test_a_file_without_a_window_runs_between_its_percentiles_and_says_so(rescale: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(1500, 200, (70, 90)), 0, 4095).astype(np.uint16)
    pixels[0, :2] = 0, 4095  # a dead and a hot element
    values = pixels * float(rescale.get("RescaleSlope", 1)) + rescale.get("RescaleIntercept", 0)
    low, high = np.percentile(values, (0.5, 99.5), method="inverted_cdf")
    expected = np.rint(255 * np.clip((values - low) / (high - low), 0, 1))
    data = film(pixels, WindowCenter=None, WindowWidth=None, **rescale)
    assert np.abs(images.decode(data) - expected).max() <= 1e-6
    assert images.read_header(data).notes == (dicom.NO_WINDOW,)


def test_eight_bits_without_a_window_are_greys_already() -> None:
    pixels = ramp(8)[:, :10].copy()
    data = film(pixels, bits=8, WindowCenter=None, WindowWidth=None)
    assert np.array_equal(images.decode(data), pixels)
    assert images.read_header(data).notes == ()
    same = film(pixels, bits=8, WindowCenter=None, WindowWidth=None, RescaleSlope=1, RescaleIntercept=0)
    assert np.array_equal(images.decode(same), pixels)


@pytest.mark.parametrize(
    "window",
    [
        {"WindowWidth": -5}, {"WindowWidth": 0}, {"WindowWidth": 0.5}, {"WindowWidth": None}, {"WindowCenter": None},
        {"WindowWidth": "nan"}, {"WindowCenter": "inf"}, {"VOILUTFunction": "MAGIC"}, {"WindowWidth": ""},
        {"VOILUTFunction": "LINEAR_EXACT", "WindowWidth": 0}, {"VOILUTFunction": "SIGMOID", "WindowWidth": -1},
    ],
)  # fmt: skip
def test_an_unusable_window_counts_as_none(window: dict[str, Any]) -> None:
    data = film(**window)
    assert images.read_header(data).notes == (dicom.NO_WINDOW,)
    assert np.array_equal(images.decode(data), images.decode(film(WindowCenter=None, WindowWidth=None)))


def test_a_window_that_shows_nothing_is_refused() -> None:
    for center in (-9000, 9000, "1e308", "-1e308"):
        with pytest.raises(ImageError) as caught:
            images.decode(film(WindowCenter=center, WindowWidth=10))
        assert (caught.value.reason, str(caught.value)) == (
            "window shows nothing",
            "The DICOM file's window makes all pixels black or all white; export it with a window that fits.",
        )
    flat = np.full((8, 9), 77, np.uint16)
    assert set(images.decode(film(flat, WindowCenter=9000, WindowWidth=10)).reshape(-1)) == {0}  # it shows all there is
    for elements in ({}, {"PixelPaddingValue": 77}):
        assert images.decode(film(flat, WindowCenter=None, WindowWidth=None, **elements)).shape == (8, 9)


# --- what is said


@pytest.mark.parametrize(
    ("elements", "note"),
    [
        ({"BodyPartExamined": "HAND"}, dicom.NOT_CHEST),
        ({"BodyPartExamined": SECRET}, dicom.NOT_CHEST),
        ({"ViewPosition": "LL"}, dicom.LATERAL),
        ({"SOPClassUID": RAW_DX, "Modality": "DX"}, dicom.RAW),
        ({"PresentationIntentType": "FOR PROCESSING"}, dicom.RAW),
        ({"BurnedInAnnotation": "YES"}, dicom.BURNED_IN),
        ({"SOPClassUID": None, "Modality": None}, dicom.NO_KIND),
    ],
)
def test_what_a_reader_should_know_is_said(elements: dict[str, Any], note: str) -> None:
    dataset = dataset_of(ramp(), **elements)
    data = written(dataset, enforce_file_format="SOPClassUID" in dataset)
    data = data if data[128:132] == b"DICM" else bytes(128) + b"DICM" + data
    assert images.read_header(data).notes == (note,)
    assert SECRET not in note
    assert images.decode(data).shape == (24, 32)


def test_thorax_and_an_empty_body_part_are_fine() -> None:
    for part in ("THORAX", "", None, "chest", "PORT CHEST"):
        assert images.read_header(film(BodyPartExamined=part)).notes == ()


def test_empty_elements_count_as_missing_ones() -> None:
    empty = ("NumberOfFrames", "PixelPaddingValue", "RescaleSlope", "PresentationLUTShape", "HighBit", "Modality")
    dataset = dataset_of(ramp())
    for keyword in empty:
        setattr(dataset, keyword, None)
    data = written(dataset, enforce_file_format=True)
    assert images.read_header(data).notes == ()
    assert np.array_equal(images.decode(data), images.decode(film()))


def test_a_file_without_preamble_or_transfer_syntax_is_read_and_says_so() -> None:
    whole = film()
    without_preamble = whole[132:]
    assert images.read_header(without_preamble).notes == (dicom.NO_PREAMBLE,)
    dataset = dataset_of(ramp())
    del dataset.file_meta
    for implicit in (True, False):
        bare = written(dataset, implicit_vr=implicit, little_endian=True)
        assert images.read_header(bare).notes == (dicom.NO_PREAMBLE, dicom.NO_SYNTAX)
        assert np.array_equal(images.decode(bare), images.decode(whole))
    assert np.array_equal(images.decode(without_preamble), images.decode(whole))


# --- what is refused


@pytest.mark.parametrize(
    ("elements", "reason", "sentence"),
    [
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "not a radiograph",
            "The DICOM file is CT Image Storage; computed or digital radiography or its capture was expected.",
        ),
        (
            {"SOPClassUID": f"1.2.{SECRET}"}, "not a radiograph",
            "The DICOM file is of another kind; computed or digital radiography or its capture was expected.",
        ),
        (
            {"SOPClassUID": SC, "Modality": "MR"}, "not a radiograph",
            "The DICOM file is of modality MR; computed or digital radiography or its capture was expected.",
        ),
        (
            {"Modality": SECRET}, "not a radiograph",
            "The DICOM file is of another modality; computed or digital radiography or its capture was expected.",
        ),
        (
            {"NumberOfFrames": 20}, "several frames",
            "The DICOM file holds 20 frames, one was expected; export the one to be judged.",
        ),
        ({"PixelData": None}, "no pixels", "The DICOM file holds no pixels; export it with its picture."),
        ({"PixelData": b""}, "no pixels", "The DICOM file holds no pixels; export it with its picture."),
        (
            {"PixelData": None, "FloatPixelData": bytes(4)}, "unsupported pixels",
            "The DICOM file stores its pixels as floating point; 8 to 16 bits grey, or 8 bits RGB or YBR, are read.",
        ),
        (
            {"PhotometricInterpretation": "PALETTE COLOR"}, "unsupported pixels",
            "The DICOM file stores its pixels as PALETTE COLOR; 8 to 16 bits grey, or 8 bits RGB or YBR, are read.",
        ),
        (
            {"PhotometricInterpretation": SECRET}, "unsupported pixels",
            ("The DICOM file stores its pixels as another kind of colour; 8 to 16 bits grey, or 8 bits RGB or YBR, are "
             "read."),
        ),
        (
            {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "unsupported pixels",
            ("The DICOM file stores its pixels as 32 of 32 bits, the highest being bit 31; 8 to 16 bits grey, or 8 "
             "bits RGB or YBR, are read."),
        ),
        (
            {"HighBit": 15}, "unsupported pixels",
            ("The DICOM file stores its pixels as 12 of 16 bits, the highest being bit 15; 8 to 16 bits grey, or 8 "
             "bits RGB or YBR, are read."),
        ),
        (
            {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "unsupported pixels",
            ("The DICOM file stores its pixels as 12 of 16 bits of colour, the highest being bit 11; 8 to 16 bits "
             "grey, or 8 bits RGB or YBR, are read."),
        ),
        ({"Rows": None}, "damaged", "The DICOM file does not say its Rows; export it again."),
        ({"PixelRepresentation": 2}, "damaged", "The DICOM file is damaged; get it again."),
        ({"Rows": 0}, "damaged", "The DICOM file is damaged; get it again."),
        ({"Rows": 65535, "Columns": 65535}, "truncated", "The DICOM file ends before its pixels do; get it again."),
        ({"Rows": 25}, "truncated", "The DICOM file ends before its pixels do; get it again."),
        (
            {"RescaleSlope": 0, "RescaleIntercept": 5}, "unusable rescale",
            ("The DICOM file's rescale slope is 0 and its intercept 5; numbers that keep the picture were expected, so "
             "export it again."),
        ),
        (
            {"RescaleSlope": "nan"}, "unusable rescale",
            ("The DICOM file's rescale slope is nan and its intercept 0; numbers that keep the picture were expected, "
             "so export it again."),
        ),
        (
            {"RescaleIntercept": "-inf"}, "unusable rescale",
            ("The DICOM file's rescale slope is 1 and its intercept -inf; numbers that keep the picture were expected, "
             "so export it again."),
        ),
        (
            {"syntax": "1.2.840.10008.1.2.4.100"}, "unsupported compression",
            "The DICOM file's pixels are stored as MPEG2 Main Profile / Main Level; export it uncompressed.",
        ),
        (
            {"syntax": "1.2.3.4.5"}, "unsupported compression",
            "The DICOM file's pixels are stored as an unknown transfer syntax; export it uncompressed.",
        ),
    ],
)  # fmt: skip
def test_what_is_no_chest_film_is_refused_by_name(elements: dict[str, Any], reason: str, sentence: str) -> None:
    dataset = dataset_of(ramp(), **{name: value for name, value in elements.items() if name != "syntax"})
    if syntax := elements.get("syntax"):
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        dataset.PixelData = encapsulate([dataset.PixelData])
    error = refused(written(dataset, enforce_file_format=True, implicit_vr=False if syntax else None))
    assert (error.reason, str(error)) == (reason, sentence)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CT_small.dcm", "not a radiograph"), ("MR_small.dcm", "not a radiograph"), ("test-SR.dcm", "not a radiograph"),
        ("rtplan.dcm", "not a radiograph"), ("JPEG-LL.dcm", "not a radiograph"), ("liver.dcm", "not a radiograph"),
        ("SC_rgb_2frame.dcm", "several frames"), ("OT-PAL-8-face.dcm", "unsupported pixels"),
        ("SC_rgb_16bit.dcm", "unsupported pixels"), ("SC_rgb_jpeg_gdcm.dcm", "unsupported compression"),
        ("emri_small_jpeg_2k_lossless_too_short.dcm", "truncated"), ("dicomdirtests/DICOMDIR", "no pixels"),
    ],
)  # fmt: skip
def test_real_files_that_are_no_chest_films_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        images.decode(real(name))
    assert caught.value.reason == reason


def test_compressed_pixels_without_a_transfer_syntax_are_refused() -> None:
    dataset = pydicom.dcmread(io.BytesIO(compressed(pydicom.uid.RLELossless, ramp())))
    del dataset.file_meta.TransferSyntaxUID
    error = refused(written(dataset, implicit_vr=False, little_endian=True))
    assert (error.reason, str(error)) == (
        "no transfer syntax",
        "The DICOM file holds compressed pixels but does not name their transfer syntax; export it again.",
    )


def test_pixels_that_are_not_stored_as_the_file_says_are_damage() -> None:
    native, rle = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"
    for data, said, other in ((film(), native, rle), (compressed(pydicom.uid.RLELossless, ramp()), rle, native)):
        assert data.count(said) == 1
        assert refused(data.replace(said, other)).reason == "damaged"


def test_a_size_beyond_all_measure_is_refused_like_that_of_any_picture() -> None:
    stream = b"\xff\x4f\xff\x51" + struct.pack(">HH8LHBBB", 41, 0, 60000, 60000, 0, 0, 60000, 60000, 0, 0, 1, 7, 1, 1)
    data = compressed(pydicom.uid.JPEG2000, ramp(8), stream + b"\xff\xd9", bits=8, Rows=60000, Columns=60000)
    error = refused(data)
    assert (error.reason, str(error)) == (
        "too large",
        "The picture is 60000 x 60000 pixels; at most 100,000,000 pixels are decoded.",
    )
    assert refused(film(np.zeros((2, 300), np.uint16), WindowCenter=None)).reason == "not a picture's shape"


@pytest.mark.parametrize("syntax", [pydicom.uid.JPEG2000, pydicom.uid.JPEGLSLossless, pydicom.uid.JPEGLosslessSV1])
def test_a_stream_of_another_size_than_the_file_says_is_refused_before_it_is_decoded(syntax: str) -> None:
    stream = {
        pydicom.uid.JPEG2000: b"\xff\x4f\xff\x51"
        + struct.pack(">HH8LHBBB", 41, 0, 60000, 50000, 0, 0, 60000, 50000, 0, 0, 1, 7, 1, 1),
        pydicom.uid.JPEGLSLossless: b"\xff\xd8\xff\xf7" + struct.pack(">HBHHB3s", 11, 8, 50000, 60000, 1, b"\1\x11\0"),
        pydicom.uid.JPEGLosslessSV1: b"\xff\xd8\xff\xc3" + struct.pack(">HBHHB3s", 11, 8, 50000, 60000, 1, b"\1\x11\0"),
    }[syntax]
    error = refused(compressed(syntax, ramp(8), stream + b"\xff\xd9", bits=8))
    assert (error.reason, str(error)) == (
        "damaged",
        (
            "The DICOM file says 32 x 24 pixels and the compressed picture inside 60000 x 50000, or they differ in "
            "depth; export it again."
        ),
    )


def test_a_deflated_bomb_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "_MAX_INFLATED_BYTES", 1 << 20)
    whole = film(syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    head = whole[: 144 + struct.unpack_from("<L", whole, 140)[0]]
    packer = zlib.compressobj(9, wbits=-15)
    bomb = head + packer.compress(bytes(300_000_000)) + packer.flush()
    tracemalloc.start()
    try:
        error = refused(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (error.reason, str(error)) == (
        "too large",
        "The DICOM file inflates to more than 1,048,576 bytes; export it uncompressed.",
    )
    assert refused(whole[:-30]).reason == "truncated"


@pytest.mark.parametrize("name", ["RG3_UNCR.dcm", "RG3_J2KI.dcm"])
def test_a_real_file_that_was_cut_off_is_refused(name: str) -> None:
    data = real(name)
    for share in (0.02, 0.3, 0.9, 0.999):
        assert refused(data[: int(share * len(data))]).reason == "truncated"


@pytest.mark.parametrize("syntax", [pydicom.uid.JPEG2000Lossless, pydicom.uid.JPEGLSLossless, pydicom.uid.RLELossless])
def test_a_compressed_picture_that_was_cut_and_sealed_again_is_never_half_a_picture(syntax: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 50), np.uint8)
    if syntax == pydicom.uid.JPEG2000Lossless:
        whole = compressed(syntax, pixels, coded(pixels, "JPEG2000", no_jp2=True, irreversible=False), bits=8)
    else:
        whole = compressed(syntax, pixels, bits=8)
    stream = bytes(get_frame(pydicom.dcmread(io.BytesIO(whole)).PixelData, 0, number_of_frames=1))
    for share in (0.2, 0.5, 0.9):
        cut = stream[: int(share * len(stream))]
        with pytest.raises(ImageError) as caught:
            images.decode(compressed(syntax, pixels, cut, bits=8))
        assert caught.value.reason in ("truncated", "damaged")
        if syntax != pydicom.uid.RLELossless:  # which has no end mark
            assert refused(compressed(syntax, pixels, cut, bits=8)).reason == "truncated"  # known without decoding
            assert outcome_of(compressed(syntax, pixels, cut + b"\xff\xd9", bits=8)) in ("truncated", "damaged")


# --- damage and secrecy


def outcome_of(data: bytes) -> str:
    """Return what became of a file, after proving that it was pixels or an ImageError and nothing else."""
    try:
        header = images.read_header(data)
        pixels = images.decode(data)
    except ImageError as error:
        told, reason = "".join(traceback.format_exception(error)), error.reason
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape == (header.height_px, header.width_px)
        told, reason = " ".join(header.notes), "read"
    assert SECRET not in told + reason
    return reason


@pytest.mark.parametrize(
    ("name", "rounds"),
    [("vlut_04.dcm", 400), ("RG3_UNCR.dcm", 60), ("MR_small_jpeg_ls_lossless.dcm", 300), ("JPGExtended.dcm", 150),
     ("MR_small_jp2klossless.dcm", 300), ("MR_small_RLE.dcm", 200), ("SC_rgb_jpeg_dcmtk.dcm", 200)],
)  # fmt: skip
def test_whatever_is_damaged_ends_in_pixels_or_in_an_image_error(
    name: str, rounds: int, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = real(name, SOPClassUID=SC, Modality="OT", PatientName=f"{SECRET}^ANNA", PatientID=SECRET)
    rng = np.random.default_rng(0)
    outcomes = set()
    caplog.set_level(logging.DEBUG)
    for turn in range(rounds):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data) if turn % 3 == 0 else 2500, size=1 + turn % 4):
            damaged[place % len(data)] = rng.integers(256)
        outcomes.add(outcome_of(bytes(damaged[: rng.integers(140, len(data))] if turn % 5 == 0 else damaged)))
    assert {"read", "truncated"} <= outcomes
    assert {outcome for outcome in outcomes if not outcome.startswith("unsupported format")} <= {
        "read", "truncated", "damaged", "no pixels", "not a radiograph", "not an image", "several frames", "too large",
        "no transfer syntax", "unsupported pixels", "unsupported compression", "window shows nothing",
        "not a picture's shape", "unusable rescale",
    }  # fmt: skip
    assert capfd.readouterr() == ("", "")  # no library printed anything
    assert caplog.text == ""


def test_nothing_about_the_patient_is_read_or_told(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = ("PatientBirthDate", "PatientAge", "PatientSex", "StudyDate", "AccessionNumber", "StudyInstanceUID")
    dataset = dataset_of(ramp(), PatientName=f"<b>{SECRET}</b>", SpecificCharacterSet=SECRET)
    with pydicom.config.disable_value_validation():
        for keyword in bad:
            setattr(dataset, keyword, SECRET)
    data = written(dataset, enforce_file_format=True)
    assert data.count(SECRET.encode()) >= 9
    caplog.set_level(logging.DEBUG, logger="pydicom")
    caplog.clear()
    with dicom.quiet:
        elements, _, _ = dicom._parse(data)
    assert {element.keyword for element in elements} <= set(dicom._READ)
    assert SECRET not in str(elements)
    assert not any(
        word in keyword for keyword in dicom._READ for word in ("Patient", "Name", "Study", "Date", "Comment")
    )
    assert len(repr(dicom.read(data))) < 200
    assert outcome_of(data) == "read"
    for end in range(200, len(data), 97):
        outcome_of(data[:end])
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert logging.getLogger("pydicom").level == logging.DEBUG  # as it was


def test_the_library_s_own_errors_do_not_hang_on_ours() -> None:
    data = film(WindowWidth=123456789).replace(b"123456789", SECRET.encode())
    with pytest.raises(ValueError, match=SECRET):  # which is what happens inside
        float(pydicom.dcmread(io.BytesIO(data)).WindowWidth)
    error = refused(data)
    assert (error.reason, str(error)) == ("damaged", "The DICOM file is damaged; get it again.")
    assert error.__cause__ is None
    assert error.__context__ is None


def test_warnings_and_logging_come_back_however_many_threads_decode() -> None:
    before = list(warnings.filters)
    level = logging.getLogger("pydicom").level
    data = [film(WindowWidth=None), film()[:-50], film(np.zeros((9, 9), np.uint16))]
    started = threading.Barrier(6)

    def work() -> None:
        started.wait()
        for turn in range(20):
            outcome_of(data[turn % 3])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
    assert logging.getLogger("pydicom").level == level
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_silence_lasts_until_the_last_one_leaves() -> None:
    with dicom.quiet:
        with dicom.quiet:
            pass
        warnings.warn("unheard", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_deep_nesting_ends_in_an_image_error() -> None:
    begin = b"\x28\x00\x10\x30SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    assert refused(film()[:300] + begin * 5000).reason in ("damaged", "truncated")


def test_a_large_radiograph_takes_few_copies() -> None:
    pixels = np.broadcast_to(np.arange(4096, dtype=np.uint16), (4096, 4096))
    data = film(np.ascontiguousarray(pixels), WindowCenter=None)
    images.decode(film())  # what is loaded once does not count
    tracemalloc.start()
    try:
        shown = images.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shown.shape == (4096, 4096)
    assert peak < 1.8 * len(data)  # the pixels as read, the greys at half their size, and bands


# --- among other files


def dicom_set(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(8):
        for label in ("NORMAL", "PNEUMONIA"):
            name = ("a.dcm", "b.dicom", "IMG0001", "1.2.840.113619.2.5", "c.DCM", "d.png", "I10", "e.dcm")[number]
            path = root / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 4096, (40, 50)).astype(np.uint16)
            path.write_bytes(coded(pixels, "PNG") if name.endswith("png") else film(pixels))
    (root / "NORMAL" / "README").write_text("no picture")
    (root / "NORMAL" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (root / "NORMAL" / "1.5").write_bytes(b"short")
    return root


@pytest.mark.parametrize("zipped", [False, True])
def test_dicom_files_are_found_by_name_or_content_and_packed(tmp_path: Path, zipped: bool) -> None:
    root = dicom_set(tmp_path / "set")
    if zipped:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for path in root.rglob("*"):
                archive.write(path, path.relative_to(root).as_posix())
        root = tmp_path / "set.zip"
    catalog = Catalog.scan(root)
    assert set(catalog.table["status"]) == {"ok"}
    assert len(catalog.table) == 16
    assert set(catalog.table["width_px"]) == {50}
    assert catalog.ignored == {"other files": 3}
    assert not any("another format" in note for note in catalog.notes)
    store = ImageStore.pack(catalog, size_px=24, cache=tmp_path / "cache")
    assert len(store.image_ids) == 16
    row = catalog.table.iloc[0]
    expected = images.load(catalog.read_bytes(row["path"]), 24)
    assert np.array_equal(store.images[store.rows_of(catalog.table.iloc[:1])[0]], expected)
