"""From files to a table, a CSV and pictures: what stands in them, whatever the files are."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from matplotlib.figure import Figure
from onnx import TensorProto, helper
from PIL import Image

from pneumoscope import _inputs, answers, figures
from pneumoscope.bundle import Bundle
from pneumoscope.errors import DataError, PneumoscopeError, UsageError
from pneumoscope.evidence import Grid, overlay
from pneumoscope.familiarity import Familiarity
from pneumoscope.narration import Mode, Narration
from pneumoscope.predictor import Curve, Description, Outputs, Predictor
from pneumoscope.specs import RESEARCH_USE

SIZE = 32
CELLS = 4
DESCRIPTION = Description(
    model="tl",
    title="Transfer learning",
    size_px=SIZE,
    grid=Grid(3.5, 8.0),
    evidence_scale=2.0,
    points={"youden": 0.6, "cost": 0.1},
    chosen_on="validation",
    curve=Curve("validation", 3, 2, np.array([0.9, 0.5]), np.array([0.25, 0.75]), np.array([1.0, 0.5])),
    temperature=2.0,
    familiarity=None,
    unfamiliar="Whether it is like the training images is not known.",
    note="SYNTHETIC DATA",
)


def network(images: npt.NDArray[np.uint8]) -> Outputs:
    """Mean brightness of each quarter of a side, as evidence; below middle grey for NORMAL."""
    step = SIZE // CELLS
    cells = images.reshape(len(images), CELLS, step, CELLS, step).mean(axis=(2, 4)) / 255 - 0.5
    bias = np.full(len(images), 0.25)
    logit = cells.sum(axis=(1, 2)) + bias
    values = (1 / (1 + np.exp(-logit)), logit, bias, cells, images.reshape(len(images), -1)[:, :8])
    return Outputs(*(value.astype(np.float32) for value in values))


MODEL = Predictor(DESCRIPTION, network)


def picture(grey: int, *, width: int = 40, height: int = 50) -> bytes:
    pixels = np.full((height, width), grey, dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 255 - grey // 2
    return encoded(pixels)


def encoded(pixels: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def voice(mode: Mode = "plain") -> tuple[Narration, io.StringIO]:
    stream = io.StringIO()
    return Narration(mode, stream=stream), stream


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of five images and the folder that it is in, where the test stands."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "scans"
    folder.mkdir()
    for at, grey in enumerate((10, 60, 120, 180, 240)):
        (folder / f"{at}.png").write_bytes(picture(grey))
    return folder


@pytest.fixture
def plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are quick to draw, for tests of where they go."""
    monkeypatch.setattr(figures, "evidence_panel", lambda *_, **__: Figure(figsize=(1, 1)))


def found(*arguments: str) -> tuple[_inputs.Input, ...]:
    return _inputs.find(arguments).inputs


def test_the_csv_has_the_rows_in_order_and_scores_that_read_back_exactly(scans: Path) -> None:
    out = scans.parent / "out" / "answers.csv"
    summary = answers.predict(MODEL, found("scans"), csv=out, batch_size=2)
    text = out.read_text()
    assert text.splitlines()[0] == "file,score,call,assessable,reason"
    expected = MODEL.answer([MODEL.read(path.read_bytes()) for path in sorted(scans.iterdir())])
    rows = rows_of(out)
    assert [row["file"] for row in rows] == [f"scans/{at}.png" for at in range(5)]
    assert [float(row["score"]) for row in rows] == [answer.score for answer in expected]
    assert [row["call"] for row in rows] == [answer.call for answer in expected]
    assert {row["call"] for row in rows} == {"NORMAL", "PNEUMONIA"}
    assert {row["assessable"] for row in rows} == {"unknown"}
    assert {row["reason"] for row in rows} == {DESCRIPTION.unfamiliar}
    assert (summary.n, summary.unreadable, summary.unknown, summary.csv) == (5, 0, 5, out)
    assert summary.calls == {call: sum(answer.call == call for answer in expected) for call in ("NORMAL", "PNEUMONIA")}


def test_calls_are_made_at_the_chosen_operating_point(scans: Path) -> None:
    every = answers.predict(MODEL.at(0.0), found("scans"))
    assert (every.operating_point, every.threshold, every.calls["PNEUMONIA"]) == ("own", 0.0, 5)
    assert answers.predict(MODEL.at(1.0), found("scans")).calls["NORMAL"] == 5
    assert answers.predict(MODEL.at("cost"), found("scans")).operating_point == "cost"


def huge_png() -> bytes:
    """30,000 x 30,000 grey pixels in a few kB: the header is what counts."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def test_hostile_files_have_their_row_and_the_good_ones_go_on(scans: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90), dtype=np.uint8)
    hostile = {
        "bomb.png": huge_png(),
        "constant.png": encoded(np.full((64, 64), 90, dtype=np.uint8)),
        "dicom.dcm": bytes(128) + b"DICM" + b"\x00" * 40,
        "empty.jpeg": b"",
        "page.jpeg": b"<html><script>alert(1)</script></html>",
        "short.jpeg": encoded(noise, "JPEG")[:1000],
        "tiny.png": encoded(np.zeros((1, 1), dtype=np.uint8)),
    }
    for name, data in hostile.items():
        (scans / name).write_bytes(data)
    os.mkfifo(scans / "pipe.png")
    (scans / "loop").symlink_to(scans)
    with zipfile.ZipFile("slip.zip", "w") as archive:
        archive.writestr("../out.png", picture(9))
    summary = answers.predict(MODEL, found("scans", "slip.zip", "gone.png"), csv=Path("out.csv"), batch_size=3)
    rows = {row["file"]: row for row in rows_of(Path("out.csv"))}
    reasons = {
        "scans/bomb.png": "The picture is over 100,000,000 pixels by far",
        "scans/empty.jpeg": "The file holds 0 bytes.",
        "scans/page.jpeg": "The file's content is not an image",
        "scans/short.jpeg": "truncated",
        "scans/pipe.png": "It is not a regular file",
        "scans/dicom.dcm": "DICOM",
        "slip.zip": "points outside it",
        "gone.png": "There is no file or folder that has this name",
    }
    for name, reason in reasons.items():
        assert reason in rows[name]["reason"]
        assert (rows[name]["score"], rows[name]["call"], rows[name]["assessable"]) == ("", "", "no")
    assert rows["scans/constant.png"]["reason"].startswith("The picture is one grey all over.")
    assert rows["scans/tiny.png"]["reason"].startswith("The picture has only 1 x 1 pixels.")
    for name in ("scans/constant.png", "scans/tiny.png"):  # decoded, so they have a score and a call
        assert rows[name]["assessable"] == "no"
        assert float(rows[name]["score"]) > 0
        assert rows[name]["call"] in ("NORMAL", "PNEUMONIA")
    assert sum(row["assessable"] == "unknown" for row in rows.values()) == 5
    assert (summary.n, summary.unreadable, summary.not_assessable, summary.unknown) == (15, 8, 2, 5)
    assert "script" not in Path("out.csv").read_text()


def test_assessable_is_yes_or_no_where_the_model_knows_its_training_images(scans: Path) -> None:
    features = network(np.stack([MODEL.read(path.read_bytes()).pixels for path in sorted(scans.iterdir())])).features
    wide = features[:4] + np.random.default_rng(0).normal(size=(4, 8))
    usual = replace(Familiarity.fit(wide, held_out=wide), threshold=10.0)
    known = Predictor(replace(DESCRIPTION, familiarity=usual, unfamiliar=""), network)
    answers.predict(known, found("scans"), csv=Path("out.csv"))
    distances = usual.assess(features)
    assert [row["assessable"] for row in rows_of(Path("out.csv"))] == ["yes" if near else "no" for near in distances[1]]
    assert {"yes", "no"} == {row["assessable"] for row in rows_of(Path("out.csv"))}


@pytest.mark.usefixtures("plain_pictures")
def test_names_cannot_run_in_a_spreadsheet_nor_steer_a_terminal(scans: Path) -> None:
    odd = ["=cmd|' C calc'!A0.png", "+1.png", "@x.png", "new\nline.png", "\x1b[31mred.png", os.fsdecode(b"\xff.png")]
    for name in odd:
        Path(name).write_bytes(picture(50))
    said, stream = voice()
    answers.predict(MODEL, found(*odd), csv=Path("out.csv"), evidence=Path("maps"), narration=said)
    files = [row["file"] for row in rows_of(Path("out.csv"))]
    assert files == ["'=cmd|' C calc'!A0.png", "'+1.png", "'@x.png", "new\nline.png", "\x1b[31mred.png", "\\udcff.png"]
    shown = stream.getvalue()
    assert "\x1b" not in shown
    assert "new\\nline.png" in shown
    assert sorted(path.name for path in Path("maps").iterdir()) == [
        "1.evidence.png",
        "31mred.evidence.png",
        "cmd_C_calc_A0.evidence.png",
        "image.evidence.png",
        "new_line.evidence.png",
        "x.evidence.png",
    ]


@pytest.mark.usefixtures("plain_pictures")
def test_pictures_have_a_name_of_their_own_inside_the_folder(scans: Path) -> None:
    inside = [
        "a/x.png",
        "b/x.png",
        "b/X.jpeg",
        "b/x-2.png",
        "../../etc/x.png",
        "..",
        ".hidden.png",
        "a\\b\\x.png",
        "日" * 90,
    ]
    data = picture(70)
    inputs = []
    for at, name in enumerate(inside):
        (scans.parent / f"in{at}").write_bytes(data)
        inputs.append(_inputs.Input(name, scans.parent / f"in{at}"))
    inputs.insert(1, _inputs.Input("c/x.png", scans.parent / "gone.png"))  # unreadable: its number is not given away
    folder = scans.parent / "deep" / "maps"
    answers.predict(MODEL, inputs, evidence=folder)
    names = sorted(path.name for path in folder.iterdir())
    expected = ["x", "x-3", "X-4", "x-2-2", "x-5", "image", "hidden", "x-6", "日" * 40]
    assert names == sorted(f"{stem}.evidence.png" for stem in expected)
    assert sorted(path.name for path in scans.parent.iterdir() if path.suffix == ".png") == []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    answers.predict(MODEL, inputs, evidence=folder)  # once more: the same names, the same pictures
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("plain_pictures")
def test_images_beside_their_pictures_are_never_written_over(scans: Path) -> None:
    before = {path.name: path.read_bytes() for path in scans.iterdir()}
    for _ in range(2):  # pictures of the first time are no images of the second
        assert answers.predict(MODEL, found("scans"), evidence=scans).n == 5
    assert {name: (scans / name).read_bytes() for name in before} == before
    assert len(list(scans.iterdir())) == 10


def test_the_scale_of_all_pictures_is_the_model_s_and_occlusion_stands_beside(
    scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    real = figures.evidence_panel

    def noting(image: npt.NDArray[np.uint8], layers: Any, **given: Any) -> Any:
        calls.append({"image": image, "layers": layers, **given})
        return real(image, layers, **given)

    monkeypatch.setattr(figures, "evidence_panel", noting)
    answers.predict(MODEL, found("scans/0.png", "scans/4.png"), evidence=Path("maps"), occlusion=True)
    for call, name in zip(calls, ("scans/0.png", "scans/4.png"), strict=True):
        assert [layer.scale for layer in call["layers"]] == [2.0, answers.OCCLUSION_SCALE]
        assert call["title"] == name
        own = MODEL.answer([MODEL.read(Path(name).read_bytes())])[0].evidence
        expected = overlay(call["image"], own, grid=DESCRIPTION.grid, scale=2.0)
        np.testing.assert_array_equal(call["layers"][0].pixels, expected)
        assert call["aspect"] == 50 / 40
        assert call["note"] == "SYNTHETIC DATA"
        assert "at the operating point youden (score > 0.6000)" in call["said"][0]
    assert calls[0]["said"][0].startswith("Score 0.")
    dark, bright = (call["layers"][0].pixels.astype(int)[-8:, -8:].mean(axis=(0, 1)) for call in calls)
    assert dark[2] > dark[0]  # blue for what speaks for NORMAL
    assert bright[0] > bright[2]
    one = calls[1]["layers"][1].pixels.astype(int)
    assert one.shape == (SIZE, SIZE, 3)
    assert (one[..., 0] > one[..., 2]).any()  # hiding what is bright takes away from the logit
    assert len(list(Path("maps").iterdir())) == 2


def test_the_logit_on_the_picture_is_the_sum_of_its_parts() -> None:
    answer = MODEL.answer([MODEL.read(picture(200))])[0]
    lines = answers.said_of(answer)
    parts = [float(word) for word in lines[1].replace("=", "").split() if word[0] in "+-"]
    assert parts[0] == pytest.approx(parts[1] + parts[2], abs=0.011)
    assert lines[2] == DESCRIPTION.unfamiliar
    assert answers.said_of(replace(answer, assessable=False, reason="Why."))[2] == "NOT ASSESSABLE. Why."
    assert len(answers.said_of(replace(answer, assessable=True, reason=""))) == 2


def test_what_a_point_achieved_on_test_is_said_beside_what_it_was_chosen_for() -> None:
    def share(value: float, **ends: float) -> dict[str, Any]:
        return {"sensitivity": value, "specificity": value, "intervals": {}, "group_intervals": dict.fromkeys(
            ("sensitivity", "specificity"), ends)}  # fmt: skip

    at = {"youden": share(0.7, low=0.6, high=0.8) | {"threshold": 0.6}, "cost": share(0.1, low=0.0, high=0.2)}
    known = replace(DESCRIPTION, metrics={"test": {"n": 1_651, "operating_points": at}})
    said = answers.sentences(answers.Summary(*known.point, None, None), known)[1]
    assert said.endswith(
        "(chosen there, which flatters), on 1,651 test images sensitivity 0.700 (0.600 to 0.800) and specificity "
        "0.700 (0.600 to 0.800)."
    )
    at["youden"]["threshold"] = 0.5  # as where a site has chosen its own since
    assert answers.sentences(answers.Summary(*known.point, None, None), known)[1].endswith(
        "(chosen there, which flatters)."
    )


@pytest.mark.usefixtures("plain_pictures")
def test_the_screen_has_a_table_counts_and_the_operating_point(scans: Path) -> None:
    (scans / "bad.png").write_bytes(b"")
    said, stream = voice()
    answers.predict(MODEL, found("scans"), csv=Path("out.csv"), evidence=Path("maps"), narration=said)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Transfer learning (tl)"
    assert lines[1].split() == ["file", "score", "call", "assessable", "reason"]
    assert len([line for line in lines if line.startswith("scans/")]) == 6
    joined = "\n".join(lines)
    assert "5 images answered: " in joined
    assert "Operating point youden: PNEUMONIA where score > 0.6000; on validation it had sensitivity 0.750" in joined
    assert "specificity 0.500 (chosen there, which flatters)." in joined
    assert "5 not known to be assessable." in joined
    assert "1 not readable as an image." in joined
    assert "The table is in out.csv." in joined
    assert "Pictures of the evidence are in maps." in joined
    assert lines[-2:] == ["SYNTHETIC DATA", f"{RESEARCH_USE}."]


def test_one_image_is_counted_as_one(scans: Path) -> None:
    said, stream = voice()
    answers.predict(MODEL, [_inputs.Input("one", scans / found("scans")[0].place.name)], narration=said)
    assert "1 image answered: " in stream.getvalue()


def test_on_a_terminal_the_end_of_a_name_stays_and_reasons_stand_below_once(scans: Path) -> None:
    inputs = [_inputs.Input(f"{'deep/' * 20}{at}.png", one.place) for at, one in enumerate(found("scans"))]
    said, stream = voice("terminal")
    answers.predict(MODEL, [*inputs, _inputs.Input("gone.png", Path("gone.png"))], narration=said)
    shown = stream.getvalue()
    assert "deep/deep/4.png" in shown
    assert "reason" not in shown
    flat = " ".join(shown.split())
    assert flat.count(DESCRIPTION.unfamiliar) == 1
    assert f"/0.png and 4 more: {DESCRIPTION.unfamiliar}" in flat
    assert "gone.png: The file cannot be read (No such file or directory)." in flat


def test_a_long_table_is_cut_on_the_screen_and_whole_in_the_csv(scans: Path) -> None:
    inputs = found("scans") * 20
    said, stream = voice()
    answers.predict(MODEL, inputs, csv=Path("out.csv"), narration=said)
    assert sum(line.startswith("scans/") for line in stream.getvalue().splitlines()) == answers.SHOWN
    assert "60 more are not shown; all are in out.csv." in stream.getvalue()
    assert len(rows_of(Path("out.csv"))) == 100
    said, stream = voice()
    answers.predict(MODEL, inputs, narration=said)
    assert "60 more are not shown; --csv OUT keeps all." in stream.getvalue()


@pytest.mark.usefixtures("plain_pictures")
def test_machines_get_one_event_for_each_file(scans: Path) -> None:
    (scans / "bad.png").write_bytes(b"")
    said, stream = voice("json")
    answers.predict(MODEL, found("scans"), evidence=Path("maps"), narration=said)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    single = [event for event in events if event["event"] == "answer"]
    assert [event["file"] for event in single] == [f"scans/{name}.png" for name in (0, 1, 2, 3, 4, "bad")]
    keys = {
        "event",
        "time",
        "file",
        "score",
        "probability",
        "call",
        "operating_point",
        "assessable",
        "reason",
        "evidence",
    }
    assert set(single[0]) == keys
    assert single[0]["evidence"] == "maps/0.evidence.png"
    assert single[0]["assessable"] is None
    bad = single[-1]
    assert (bad["score"], bad["call"], bad["assessable"], bad["evidence"]) == (None, None, False, None)
    assert bad["reason"] == "The file holds 0 bytes."
    assert events[-1]["event"] == "predicted"
    assert (events[-1]["n"], events[-1]["unreadable"], events[-1]["note"]) == (6, 1, "SYNTHETIC DATA")


def test_no_image_at_all_is_an_error_after_the_csv_is_written(scans: Path) -> None:
    Path("a.png").write_bytes(b"")
    Path("b.png").write_bytes(b"words")
    sentence = (
        r"^No image could be read \(2 files tried\); the first, 'a\.png': The file holds 0 bytes\. "
        r"Give JPEG, PNG or DICOM files\.$"
    )
    with pytest.raises(DataError, match=sentence):
        answers.predict(MODEL, found("a.png", "b.png"), csv=Path("out.csv"), evidence=Path("maps"))
    assert [row["assessable"] for row in rows_of(Path("out.csv"))] == ["no", "no"]


def test_an_interruption_loses_no_earlier_table_and_leaves_no_thread(scans: Path) -> None:
    Path("out.csv").write_text("earlier\n")

    def interrupted(images: npt.NDArray[np.uint8]) -> Outputs:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers.predict(Predictor(DESCRIPTION, interrupted), found("scans"), csv=Path("out.csv"))
    assert Path("out.csv").read_text() == "earlier\n"
    assert sorted(path.name for path in scans.parent.iterdir() if path.is_file()) == ["out.csv"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_at_most_two_batches_are_read_ahead(scans: Path) -> None:
    taken = 0

    class Counted(tuple[_inputs.Input, ...]):
        def __iter__(self) -> Iterator[_inputs.Input]:
            nonlocal taken
            for one in super().__iter__():
                taken += 1
                yield one

    sizes = []

    def noting(images: npt.NDArray[np.uint8]) -> Outputs:
        sizes.append(len(images))
        return network(images)

    stream = answers.answered(Predictor(DESCRIPTION, noting), Counted(found("scans") * 40), batch_size=4)
    for done in range(1, 101):
        next(stream)
        assert taken <= done + 2 * 4
    stream.close()
    assert set(sizes) == {4}


def test_places_that_cannot_be_written_are_refused_before_the_work(scans: Path) -> None:
    inputs = found("scans")
    before = (scans / "0.png").read_bytes()
    with pytest.raises(UsageError, match="scans is a folder; give the name of a CSV file to write"):
        answers.predict(MODEL, inputs, csv=Path("scans"))
    with pytest.raises(UsageError, match=r"0\.png is one of the files to answer about; give another name"):
        answers.predict(MODEL, inputs, csv=scans / "0.png")
    with pytest.raises(UsageError, match=r"0\.png is a file; give a folder for the pictures"):
        answers.predict(MODEL, inputs, evidence=scans / "0.png")
    with pytest.raises(PneumoscopeError, match=r"Cannot make the folder .*0\.png/maps: Not a directory; choose one"):
        answers.predict(MODEL, inputs, evidence=scans / "0.png" / "maps")
    with pytest.raises(UsageError, match="A map of occlusion is a picture; say with --evidence DIR where pictures go"):
        answers.predict(MODEL, inputs, occlusion=True)
    assert (scans / "0.png").read_bytes() == before


def test_a_bundle_on_the_disk_answers_alike_for_files_folders_and_archives(scans: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["image"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["grey"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["score"]),
        helper.make_node("Mul", ["logit", "zero"], ["bias"]),
        helper.make_node("Reshape", ["logit", "map"], ["evidence"]),
        helper.make_node("Reshape", ["logit", "row"], ["features"]),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        for name, value in (("scale", 0.05), ("offset", -5.0), ("zero", 0.0))
    ]
    constants += [
        helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape)
        for name, shape in (("map", [-1, 1, 1]), ("row", [-1, 1]))
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *[1] * more])
        for name, more in zip(Outputs._fields, (0, 0, 0, 2, 1), strict=True)
    ]
    taken = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", SIZE, SIZE])]
    graph = helper.make_graph(nodes, "tiny", taken, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    model = Bundle.write(Path("bundle"), network=proto.SerializeToString(), description=DESCRIPTION).predictor(
        threads=1
    )
    with zipfile.ZipFile("all.zip", "w") as archive:
        for path in sorted(scans.iterdir()):
            archive.write(path, f"x/{path.name}")
    answers.predict(model, found("scans", "all.zip", "scans/*.png"), csv=Path("out.csv"), batch_size=4)
    scores = [row["score"] for row in rows_of(Path("out.csv"))]
    assert scores[:5] == scores[5:10] == scores[10:]
    pixels = [MODEL.read(path.read_bytes()).pixels.mean() for path in sorted(scans.iterdir())]
    expected = 1 / (1 + np.exp(-(0.05 * np.array(pixels) - 5)))
    np.testing.assert_allclose([float(score) for score in scores[:5]], expected, atol=1e-6)


def test_a_real_radiograph_in_dicom_is_answered_from_an_archive_without_a_word_about_the_patient(scans: Path) -> None:
    spec = find_spec("data_store")  # what pydicom-data installs
    file = Path(spec.origin).parent / "data" / "RG1_UNCR.dcm" if spec and spec.origin else None
    if file is None or not file.is_file():
        pytest.skip("pydicom-data is not installed")
    with zipfile.ZipFile("study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "series/1.2.840.99")
        archive.writestr("series/DICOMDIR", b"x")
    said, stream = voice()
    answers.predict(MODEL, found("study.zip"), csv=Path("out.csv"), evidence=Path("maps"), narration=said)
    (row,) = rows_of(Path("out.csv"))
    assert row["file"] == "study.zip/series/1.2.840.99"
    assert float(row["score"]) == MODEL.answer([MODEL.read(file.read_bytes())])[0].score
    assert [path.name for path in Path("maps").iterdir()] == ["1.2.840.evidence.png"]
    assert "Compressed" not in Path("out.csv").read_text() + stream.getvalue()  # of the patient's name in this file
