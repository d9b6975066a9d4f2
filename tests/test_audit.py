"""The audit: each fault is planted in real files and must be found, named, counted and judged; sound data must pass."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from pneumoscope import _files, appearance, phantom
from pneumoscope.audit import FINDINGS, MAX_EXAMPLES, Audit, Finding, audit, kaggle_facts
from pneumoscope.catalog import COLUMNS, Catalog
from pneumoscope.errors import DataError, SpecError
from pneumoscope.specs import ALLOWABLE, Spec
from pneumoscope.store import ImageStore

Grey = npt.NDArray[np.uint8]


def noise(seed: int, *, width_px: int = 40, height_px: int = 36) -> Grey:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px), dtype=np.uint8)


def png(pixels: Grey, **options: Any) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG", **options)
    return buffer.getvalue()


def jpeg(pixels: Grey) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=80)
    return buffer.getvalue()


@dataclass(frozen=True)
class File:
    """One line of a manifest, and the file it names."""

    path: str
    data: bytes
    label: int
    split: str = "train"
    group: str = ""


def sound_files() -> list[File]:
    """Each label twice in each split, every file another patient."""
    names = [(split, label, at) for split in ("train", "validation", "test") for label in (0, 1) for at in (0, 1)]
    return [
        File(f"{split}-{label}-{at}.png", png(noise(seed)), label, split, f"patient {seed}")
        for seed, (split, label, at) in enumerate(names)
    ]


def plant(root: Path, files: Iterable[File]) -> Catalog:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "list.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["path", "label", "split", "group"])
        for file in files:
            (root / file.path).write_bytes(file.data)
            writer.writerow([file.path, file.label, file.split, file.group])
    return Catalog.scan(root / "list.csv")


def audited(root: Path, files: Iterable[File], *, allow: Sequence[str] = ()) -> Audit:
    catalog = plant(root, files)
    return audit(catalog, ImageStore.pack(catalog, size_px=32), allow=allow)


def found(report: Audit) -> dict[str, Finding]:
    names = [finding.name for finding in report.findings]
    assert len(names) == len(set(names))
    assert set(names) <= set(FINDINGS)
    return {finding.name: finding for finding in report.findings}


def assert_refused(report: Audit, *names: str) -> None:
    assert {finding.name for finding in report.refusals} == set(names)
    assert report.exit_status == 1
    with pytest.raises(DataError, match=r"^The audit refuses these data\. ") as refusal:
        report.require_passed()
    for finding in report.refusals:
        assert f"{finding.name}: {finding.sentence}" in str(refusal.value)


def assert_passed(report: Audit) -> None:
    assert report.refusals == ()
    assert report.exit_status == 0
    report.require_passed()


# --- sound data ------------------------------------------------------------------------------------------------------


def test_sound_data_pass_without_a_finding(tmp_path: Path) -> None:
    report = audited(tmp_path, sound_files())
    assert report.findings == ()
    assert_passed(report)
    assert tuple(report.measures.columns) == appearance.MEASURES
    assert len(report.measures) == 12
    assert len(report.pairs) == 0


def test_the_synthetic_set_passes_and_says_that_it_is_not_the_published_one(packed: tuple[Catalog, ImageStore]) -> None:
    report = audit(*packed)
    assert_passed(report)
    assert found(report)["kaggle-facts"].sentence.startswith(
        "The names are those of the Kaggle set, but the 64 files (NORMAL 19, PNEUMONIA 45) are not its 5,232 + 624: "
    )


def test_progress_is_passed_on(packed: tuple[Catalog, ImageStore]) -> None:
    seen: list[tuple[int, int]] = []
    audit(*packed, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 64)]


# --- leaks into test -------------------------------------------------------------------------------------------------


def test_a_copy_in_train_and_test_is_a_leak_that_is_never_allowed(tmp_path: Path) -> None:
    files = sound_files()
    copy = File("copy.png", files[8].data, 0, "train", "another")
    assert files[8].split == "test"
    report = audited(tmp_path, [*files, copy], allow=ALLOWABLE)
    assert_refused(report, "content-across-test", "group-across-test")  # scanning joins the two patients
    leak = found(report)["content-across-test"]
    assert leak.count == 1
    assert leak.examples == ((files[8].path, "copy.png"),)
    assert leak.sentence == (
        "1 image (2 files) in test and outside it: the test asks what was seen in training, which is never allowed; "
        "delete the copies on one side."
    )


@pytest.mark.parametrize("side", ["validation", "calibration"])
def test_a_copy_in_test_and_in_what_steers_training_is_a_leak_too(tmp_path: Path, side: str) -> None:
    files = sound_files()
    copy = File("copy.png", files[8].data, 0, side, "another")
    other = File("other.png", png(noise(99)), 1, side, "99")
    assert "content-across-test" in {finding.name for finding in audited(tmp_path, [*files, copy, other]).refusals}


def test_equal_pixels_in_other_bytes_are_a_leak_too(tmp_path: Path) -> None:
    files = sound_files()
    pixels = noise(8)
    assert png(pixels) == files[8].data
    copy = File("copy.png", png(pixels, compress_level=0), 0, "train", "another")
    report = audited(tmp_path, [*files, copy])
    assert_refused(report, "content-across-test")
    assert found(report)["content-across-test"].examples == ((files[8].path, "copy.png"),)
    assert found(report)["duplicate-pixels"].examples == ((files[8].path, "copy.png"),)
    assert "duplicate-content" not in found(report)


def test_a_patient_in_train_and_test_is_a_leak_that_is_never_allowed(tmp_path: Path) -> None:
    files = [*sound_files(), File("more.png", png(noise(50)), 0, "train", "patient 8")]
    report = audited(tmp_path, files, allow=ALLOWABLE)
    assert_refused(report, "group-across-test")
    leak = found(report)["group-across-test"]
    assert (leak.count, leak.examples) == (1, (("patient 8", "test-0-0.png", "more.png"),))
    assert leak.sentence == (
        "1 group (2 files) in test and outside it: the test asks what was seen in training, which is never allowed; "
        "move each group whole to one side."
    )


@pytest.mark.parametrize("name", ["content-across-test", "group-across-test", "class-missing", "near-duplicate", "x"])
def test_what_cannot_be_allowed_is_refused_by_name(packed: tuple[Catalog, ImageStore], name: str) -> None:
    message = (
        f"^audit.allow names '{name}', but only content-across-validation, group-across-validation, two-labels can be "
        "allowed: what reaches into test never is, and other findings stop no run; take it out.$"
    )
    with pytest.raises(SpecError, match=message):
        audit(*packed, allow=("two-labels", name))


def test_every_leak_is_kept_and_of_other_findings_so_many(tmp_path: Path) -> None:
    files = sound_files()
    for at in range(MAX_EXAMPLES + 5):
        picture = png(noise(1000 + at, width_px=9, height_px=9))
        files += [File(f"{at}-{split}.png", picture, 0, split, f"many {at}") for split in ("train", "test")]
    findings = found(audited(tmp_path, files))
    for name in ("content-across-test", "group-across-test"):
        assert findings[name].count == len(findings[name].examples) == MAX_EXAMPLES + 5
    assert findings["duplicate-content"].count == MAX_EXAMPLES + 5
    assert len(findings["duplicate-content"].examples) == MAX_EXAMPLES
    assert findings["tiny"].count == 2 * (MAX_EXAMPLES + 5)
    assert len(findings["tiny"].examples) == MAX_EXAMPLES


# --- leaks between train, validation and calibration -----------------------------------------------------------------


@pytest.mark.parametrize("sides", [("train", "validation"), ("train", "calibration"), ("validation", "calibration")])
def test_a_cut_patient_is_an_error_unless_allowed(tmp_path: Path, sides: tuple[str, str]) -> None:
    files = [
        *sound_files(),
        File("keep-0.png", png(noise(60)), 0, sides[1], "60"),
        File("keep-1.png", png(noise(61)), 1, sides[1], "61"),
        *(File(f"cut-{side}.png", png(noise(70 + at)), 0, side, "cut") for at, side in enumerate(sides)),
    ]
    report = audited(tmp_path, files)
    assert_refused(report, "group-across-validation")
    finding = found(report)["group-across-validation"]
    assert (finding.count, finding.examples) == (1, (("cut", f"cut-{sides[0]}.png", f"cut-{sides[1]}.png"),))
    assert finding.sentence == (
        "1 group (2 files) in two of train, validation and calibration: figures on validation flatter; split by group, "
        "or move each group whole to one side, or allow it with --allow group-across-validation."
    )
    allowed = audited(tmp_path, files, allow=["group-across-validation"])
    assert_passed(allowed)
    again = found(allowed)["group-across-validation"]
    assert (again.severity, again.examples) == ("warning", finding.examples)
    assert again.sentence.endswith("figures on validation flatter; allowed by name.")


def copies_across_validation(*, groups: tuple[str, str]) -> list[File]:
    """One picture in train and validation, in other bytes, so that scanning does not join the groups."""
    copies = (png(noise(80)), png(noise(80), compress_level=0))
    sides = ("train", "validation")
    return [File(f"copy-{side}.png", copies[at], 0, side, groups[at]) for at, side in enumerate(sides)]


def test_copies_inside_a_cut_group_follow_it(tmp_path: Path) -> None:
    files = [*sound_files(), *copies_across_validation(groups=("one", "one"))]
    both = ("content-across-validation", "group-across-validation")
    assert_refused(audited(tmp_path, files), *both)
    assert_refused(audited(tmp_path, files, allow=both[:1]), "group-across-validation")
    report = audited(tmp_path, files, allow=both[1:])
    assert_passed(report)
    assert {found(report)[name].severity for name in both} == {"warning"}


def test_copies_of_two_groups_must_be_allowed_by_their_own_name(tmp_path: Path) -> None:
    files = [*sound_files(), *copies_across_validation(groups=("one", "two"))]
    report = audited(tmp_path, files, allow=["group-across-validation"])
    assert_refused(report, "content-across-validation")
    assert found(report)["content-across-validation"].sentence == (
        "1 image (2 files) in two of train, validation and calibration: figures on validation flatter; delete all "
        "copies but one, or allow it with --allow content-across-validation."
    )
    assert_passed(audited(tmp_path, files, allow=["content-across-validation"]))


def test_what_stands_in_test_too_is_not_counted_between_train_and_validation(tmp_path: Path) -> None:
    copy = png(noise(80))
    files = [*sound_files(), *(File(f"copy-{side}.png", copy, 0, side, "one") for side in ("train", "test"))]
    assert_refused(audited(tmp_path, files), "content-across-test", "group-across-test")


# --- labels and classes ----------------------------------------------------------------------------------------------


def test_one_image_under_two_labels_is_an_error_unless_allowed(tmp_path: Path) -> None:
    files = sound_files()
    files += [File("sick.png", files[0].data, 1, "train", "patient 0")]
    files += [File("twin.png", png(noise(2), compress_level=0), 0, "train", "patient 2")]
    assert (files[0].label, files[2].label) == (0, 1)
    report = audited(tmp_path, files)
    assert_refused(report, "two-labels")
    finding = found(report)["two-labels"]
    assert (finding.count, set(finding.examples)) == (
        2,
        {("train-0-0.png", "sick.png"), ("train-1-0.png", "twin.png")},
    )
    assert finding.sentence == (
        "2 images (4 files) under both labels, of which one is wrong: find out which, and delete its files, or all."
    )
    allowed = audited(tmp_path, files, allow=["two-labels"])
    assert_passed(allowed)
    assert found(allowed)["two-labels"].severity == "warning"
    assert found(allowed)["two-labels"].sentence.endswith("of which one is wrong: allowed by name.")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_class_missing_where_models_learn_is_an_error(tmp_path: Path, split: str) -> None:
    files = [file for file in sound_files() if (file.split, file.label) != (split, 0)]
    report = audited(tmp_path, files, allow=ALLOWABLE)
    assert_refused(report, "class-missing")
    assert found(report)["class-missing"].sentence == (
        f"There is no NORMAL image in {split}: no model can be trained so; add images, or check the names of the "
        "folders."
    )


def test_a_class_missing_in_test_is_a_warning(tmp_path: Path) -> None:
    report = audited(tmp_path, [file for file in sound_files() if (file.split, file.label) != ("test", 1)])
    assert_passed(report)
    finding = found(report)["class-missing"]
    assert (finding.severity, finding.count) == ("warning", 1)
    assert finding.sentence == (
        "There is no PNEUMONIA image in test: what compares the classes there stays undefined; add images, or check "
        "the names of the folders."
    )


def test_a_set_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    catalog, store = plant(tmp_path / "bad", [File("a.png", b"", 0), File("b.png", b"%PDF", 1)]), None
    other = plant(tmp_path / "good", sound_files())
    store = ImageStore.pack(other, size_px=32)
    report = audit(catalog, store)
    assert_refused(report, "class-missing")
    assert found(report)["class-missing"].sentence == (
        "No image can be used, so nothing can be learned or measured; JPEG, PNG and DICOM images are expected."
    )
    assert found(report)["unreadable"].count == 2
    assert len(report.measures) == 0
    json.dumps(_files.jsonable(report.as_dict()), allow_nan=False)


def test_imbalance_is_noted_from_two_to_one(tmp_path: Path) -> None:
    more = [File(f"more-{at}.png", png(noise(200 + at)), 1, "train", f"more {at}") for at in range(6)]
    assert "class-imbalance" not in found(audited(tmp_path, [*sound_files(), *more[:5]]))
    finding = found(audited(tmp_path, [*sound_files(), *more]))["class-imbalance"]
    assert (finding.severity, finding.count) == ("note", 12)
    assert finding.sentence == (
        "PNEUMONIA has 2.0 times as many files as NORMAL (80% of train, 50% of validation, 50% of test): to call "
        "everything PNEUMONIA is right that often, so read sensitivity and specificity beside accuracy."
    )


# --- files and groups ------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_listed_with_the_reasons(tmp_path: Path) -> None:
    whole = jpeg(noise(1, width_px=200, height_px=150))
    files = [
        *sound_files(),
        File("empty.png", b"", 0),
        File("page.png", b"<html>", 0),
        File("half.jpeg", whole[: len(whole) // 2], 1),  # its header is whole: only packing finds out
    ]
    report = audited(tmp_path, files)
    finding = found(report)["unreadable"]
    assert (finding.severity, finding.count) == ("warning", 3)
    assert finding.examples == ("empty.png", "page.png", "half.jpeg")
    for reason in ("empty file 1", "not an image 1", "truncated 1"):
        assert reason in finding.sentence
    assert finding.sentence.startswith("3 files: left out because they cannot be used (")
    assert finding.sentence.endswith("); get them again, or delete them.")
    assert len(report.measures) == 12


def test_misnamed_files_are_noted(tmp_path: Path) -> None:
    files = [
        *sound_files(),
        File("really.jpeg", png(noise(40)), 0, group="40"),
        File("truly.PNG", jpeg(noise(41)), 1, group="41"),
        File("right.JPG", jpeg(noise(42)), 1, group="42"),
        File("any.bmp", png(noise(43)), 0, group="43"),
    ]
    finding = found(audited(tmp_path, files))["misnamed"]
    assert (finding.severity, finding.examples) == ("note", ("really.jpeg", "truly.PNG"))
    assert finding.sentence == (
        "2 files: another format than the name says; read by their content, so there is nothing to do."
    )


def test_files_of_several_pages_are_found(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(seed)) for seed in (40, 41)]
    pages[0].save(buffer := io.BytesIO(), "PNG", save_all=True, append_images=pages[1:])
    report = audited(tmp_path, [*sound_files(), File("film.png", buffer.getvalue(), 0, group="40")])
    finding = found(report)["multi-page"]
    assert (finding.severity, finding.examples) == ("warning", ("film.png",))
    assert finding.sentence == (
        "1 file: several pages, of which only the first was read; look whether it is the right one."
    )
    assert report.measures["frames"].tolist() == [1] * 12 + [2]


def test_names_that_tell_no_patient_are_counted(tmp_path: Path) -> None:
    files = [*sound_files(), File("a.png", png(noise(40)), 0), File("b.png", png(noise(41)), 1)]
    finding = found(audited(tmp_path, files))["unknown-names"]
    assert (finding.severity, finding.examples) == ("warning", ("a.png", "b.png"))
    assert finding.sentence == (
        "2 files: names (of 14) that tell no patient, so each is a group of its own, and one patient may stand in two "
        "splits; name the patients in the column group of a manifest."
    )


def test_large_groups_are_named_the_largest_first(tmp_path: Path) -> None:
    files = sound_files()
    for group, n in (("nine", 9), ("ten", 10), ("twelve", 12)):
        files += [File(f"{group}-{at}.png", png(noise(300 + 20 * n + at)), at % 2, group=group) for at in range(n)]
    finding = found(audited(tmp_path, files))["large-group"]
    assert (finding.severity, finding.count, finding.examples) == ("note", 2, ("twelve", "ten"))
    assert finding.sentence == (
        "2 groups of 10 files or more, the largest twelve with 12: files of one patient are alike, so take intervals "
        "made by group."
    )


# --- duplicates ------------------------------------------------------------------------------------------------------


def test_duplicates_by_bytes_and_by_pixels_are_told_apart(tmp_path: Path) -> None:
    files = sound_files()
    files += [File(f"same-{at}.png", files[0].data, 0, "train", "patient 0") for at in range(2)]
    files += [File("pixels.png", png(noise(1), compress_level=0), 0, "train", "patient 1")]
    report = audited(tmp_path, files)
    assert_passed(report)
    findings = found(report)
    assert findings["duplicate-content"].examples == (("train-0-0.png", "same-0.png", "same-1.png"),)
    assert findings["duplicate-content"].sentence == (
        "1 image (3 files) more than once, byte for byte: each copy counts; delete all but one to count them once."
    )
    assert findings["duplicate-pixels"].examples == (("train-0-1.png", "pixels.png"),)
    assert findings["duplicate-pixels"].sentence == (
        "1 image (2 files) more than once, in other bytes but with the same pixels: each copy counts; delete all but "
        "one to count them once."
    )
    assert "near-duplicate" not in findings


@pytest.mark.parametrize(("split", "severity"), [("train", "note"), ("test", "warning")])
def test_images_that_look_alike_are_candidates_that_stop_nothing(tmp_path: Path, split: str, severity: str) -> None:
    chest = phantom.draw(0, seed=1, width_px=100, height_px=80)
    files = [
        *sound_files(),
        File("chest.png", png(chest), 0, "train", "chest"),
        File("again.jpeg", jpeg(chest), 0, split, "again"),
    ]
    report = audited(tmp_path, files)
    assert_passed(report)
    finding = found(report)["near-duplicate"]
    assert (finding.severity, finding.count, finding.examples) == (severity, 1, (("chest.png", "again.jpeg"),))
    assert finding.sentence == (
        f"1 pair of images that look alike, 1 in different groups and {int(split == 'test')} in different splits: "
        "candidates only, nothing was left out; look at them side by side, and delete copies."
    )
    assert report.pairs[["first", "second"]].to_numpy().tolist() == [["chest.png", "again.jpeg"]]
    assert len(report.measures) == 14


def test_very_many_candidates_are_counted_though_not_all_are_listed(tmp_path: Path) -> None:
    chest = phantom.draw(0, seed=1, width_px=100, height_px=80).astype(np.float64)
    rng = np.random.default_rng(0)
    copies = [np.clip(chest + rng.normal(0, 2, chest.shape), 0, 255).astype(np.uint8) for _ in range(50)]
    files = [*sound_files(), *(File(f"c{at}.png", png(copy), 0, group="chest") for at, copy in enumerate(copies))]
    finding = found(audited(tmp_path, files))["near-duplicate"]
    assert (finding.count, len(finding.examples)) == (1225, MAX_EXAMPLES)
    assert (
        "1,225 pairs of images that look alike, of the 1,000 most alike 0 in different groups and 0 in"
        in finding.sentence
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def test_constant_and_tiny_images_are_found(tmp_path: Path) -> None:
    files = [
        *sound_files(),
        File("grey.png", png(np.full((40, 40), 90, np.uint8)), 0, group="40"),
        File("low.png", png(noise(41, width_px=90, height_px=15)), 0, group="41"),
        File("half.png", png(noise(42, width_px=16, height_px=16)), 1, group="42"),
    ]
    findings = found(audited(tmp_path, files))
    assert (findings["constant"].severity, findings["constant"].examples) == ("warning", ("grey.png",))
    assert findings["constant"].sentence == "1 file: one grey all over; they show nothing, so delete them."
    assert (findings["tiny"].severity, findings["tiny"].examples) == ("warning", ("low.png",))
    assert findings["tiny"].sentence == (
        "1 file: less than half of 32 px high or wide, hence enlarged; get larger ones, or lower image.size_px."
    )


def test_turned_and_inverted_images_are_found(tmp_path: Path) -> None:
    chests = [phantom.draw(seed % 2, seed=seed, width_px=100, height_px=80) for seed in range(23)]
    chests[20], chests[21], chests[22] = np.rot90(chests[20]), 255 - chests[21], np.rot90(255 - chests[22])
    files = [File(f"{at:02}.png", png(chest), at % 2, group=f"p{at}") for at, chest in enumerate(chests)]
    report = audited(tmp_path, files)
    findings = found(report)
    assert (findings["rotated"].severity, findings["rotated"].examples) == ("warning", ("20.png", "22.png"))
    assert findings["rotated"].sentence == "2 files: turned, it seems; look at them, and turn them upright."
    assert (findings["inverted"].severity, findings["inverted"].examples) == ("warning", ("21.png", "22.png"))
    assert findings["inverted"].sentence == "2 files: negatives, it seems; look at them, and invert them."
    assert report.measures["orientation"].tolist()[20:] == ["turned-270", "inverted", "inverted-turned-270"]


# --- the published set -----------------------------------------------------------------------------------------------


def named_as_kaggle(counts: dict[str, tuple[int, int]], *, copies: Sequence[int] = ()) -> Catalog:
    """A table of so many (NORMAL, PNEUMONIA) files in each split; `copies` says how many times one image is there."""
    rows = []
    for split, of_label in counts.items():
        for label, n in enumerate(of_label):
            for at in range(n):
                group = f"{('IM', 'virus')[label]}/{split}{at}"
                rows.append([f"{split}/{label}/{at}.jpeg", "", split, label, group, "", 400 + at % 7, 300, 1, "ok"])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    ids = [f"{at:016x}" for at in range(len(rows))]
    at = 0
    for n in copies:
        ids[at : at + n] = [ids[at]] * n
        at += n
    return Catalog(Path("/data"), table.assign(image_id=ids))


PUBLISHED = {"train": (1079, 3106), "validation": (270, 777), "test": (234, 390)}
COPIES_IN_TRAIN = [2] * 22 + [3] * 2
COPIES = [*COPIES_IN_TRAIN, *[2] * 6]
BY_COUNTS = "By names and counts, the published"
APART = "figures do not compare with published ones."
ALL_COPIES = "Its 30 groups of byte-identical files (62 files) are there."
KAGGLE = [
    (
        PUBLISHED,
        COPIES,
        f"{BY_COUNTS} 5,232 train images (with the 16 of its val folder) and 624 test images. {ALL_COPIES}",
    ),
    (
        {"train": (1341, 3875), "test": (234, 390)},
        COPIES_IN_TRAIN,
        (
            f"{BY_COUNTS} 5,216 train and 624 test images, without the 16 of its val folder. "
            "It has 24 groups of byte-identical files (50 files) where 30 (62) are known."
        ),
    ),
    (
        {"train": (1080, 3501), "test": (269, 382)},
        COPIES_IN_TRAIN,
        (
            f"{BY_COUNTS} 5,232 train images, divided anew (651 files in test), without the 624 of test: {APART} "
            "Its 24 groups of byte-identical files (50 files) are there."
        ),
    ),
    (
        {"train": (1483, 3773), "test": (100, 500)},
        COPIES,
        f"{BY_COUNTS} 5,856 images, divided anew (600 files in test): {APART} {ALL_COPIES}",
    ),
    (
        {"train": (1349, 3882), "test": (234, 390)},
        COPIES,
        (
            "The names are those of the Kaggle set, but the 5,855 files (NORMAL 1,583, PNEUMONIA 4,272) are not its "
            f"5,232 + 624: {APART}"
        ),
    ),
]


@pytest.mark.parametrize(("counts", "copies", "sentence"), KAGGLE)
def test_the_published_set_is_recognised_and_what_differs_is_said(
    counts: dict[str, tuple[int, int]], copies: list[int], sentence: str
) -> None:
    facts = kaggle_facts(named_as_kaggle(counts, copies=copies))
    assert facts == Finding("kaggle-facts", "note", sum(map(sum, counts.values())), sentence)


def test_other_files_and_one_size_are_said_too() -> None:
    catalog = named_as_kaggle(PUBLISHED, copies=COPIES)
    table = catalog.table.assign(width_px=224, height_px=224)
    strange = table.iloc[:3].assign(path=["a", "b", "c"], group=["file/a", "file/b", "file/c"], image_id="x")
    facts = kaggle_facts(dataclasses.replace(catalog, table=pd.concat([table, strange], ignore_index=True)))
    assert facts is not None
    assert facts.count == 5856
    assert facts.sentence.endswith(
        "(62 files) are there. All are 224 x 224 px, the published ones differ in size: these are made from them. "
        "3 other files besides."
    )


def test_names_of_another_set_are_not_judged() -> None:
    catalog = named_as_kaggle(PUBLISHED)
    assert kaggle_facts(dataclasses.replace(catalog, table=catalog.table.assign(group="hospital/1"))) is None
    swapped = catalog.table.assign(label=1 - catalog.table["label"])
    assert kaggle_facts(dataclasses.replace(catalog, table=swapped)) is None
    assert kaggle_facts(dataclasses.replace(catalog, table=catalog.table.iloc[:0])) is None


# --- the whole report ------------------------------------------------------------------------------------------------


def everything_wrong() -> list[File]:
    """One set with every fault that a readable set can have."""
    files = sound_files()
    chests = [phantom.draw(1, seed=seed, width_px=100, height_px=80) for seed in range(20)]
    files += [File(f"c{at}.png", png(chest), 1, group="many") for at, chest in enumerate(chests)]
    pages = [Image.fromarray(noise(seed)) for seed in (40, 41)]
    pages[0].save(film := io.BytesIO(), "PNG", save_all=True, append_images=pages[1:])
    return [
        *files,
        File("turned.png", png(np.rot90(chests[0])), 1, group="g1"),
        File("negative.png", png(255 - chests[1]), 1, group="g2"),
        File("alike.jpeg", jpeg(chests[2]), 1, "validation", "g3"),
        File("pixels.png", png(chests[3], compress_level=0), 0, "validation", "many"),
        File("copy.png", files[0].data, 0, "test", "g4"),
        File("film.png", film.getvalue(), 0, group="g5"),
        File("grey.jpeg", png(np.full((9, 9), 90, np.uint8)), 0),
        File("empty.png", b"", 0),
        File("only.png", png(noise(90)), 1, "calibration", "g6"),
    ]


def test_every_finding_is_found_in_some_data(tmp_path: Path) -> None:
    findings = found(audited(tmp_path, everything_wrong()))
    assert set(findings) == set(FINDINGS) - {"kaggle-facts"}


def test_errors_come_first_then_warnings_then_notes(tmp_path: Path) -> None:
    report = audited(tmp_path, everything_wrong())
    order = [("error", "warning", "note").index(finding.severity) for finding in report.findings]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}
    names = list(FINDINGS)
    for severity in range(3):
        places = [
            names.index(finding.name) for finding, at in zip(report.findings, order, strict=True) if at == severity
        ]
        assert places == sorted(places)
    assert all(finding.count > 0 and finding.sentence.endswith(".") for finding in report.findings)


def test_audit_json_holds_findings_pairs_measures_and_rules(tmp_path: Path) -> None:
    report = audited(tmp_path / "data", everything_wrong())
    _files.write_json(tmp_path / "audit.json", report.as_dict())
    content = _files.read_json(tmp_path / "audit.json")
    assert content["schema_version"] == 1
    assert content["passed"] is False
    assert content["n_images"] == len(report.measures) == 40
    assert [finding["name"] for finding in content["findings"]] == [finding.name for finding in report.findings]
    leak = next(finding for finding in content["findings"] if finding["name"] == "content-across-test")
    assert leak["examples"] == [["train-0-0.png", "copy.png"]]
    assert len(content["pairs"]) == len(report.pairs)
    assert {"first", "second", "distance", "correlation", "same_group", "same_split"} == set(content["pairs"][0])
    widths = report.measures["width_px"]
    assert content["measures"]["width_px"] == {"min": widths.min(), "median": widths.median(), "max": widths.max()}
    assert content["rules"]["hash_distance"] == appearance.HASH_DISTANCE
    no_jpeg = audited(tmp_path / "sound", sound_files()).as_dict()
    assert _files.jsonable(no_jpeg)["measures"]["jpeg_quality"] == {"min": None, "median": None, "max": None}


def test_the_data_and_the_catalog_are_left_as_they_were(tmp_path: Path) -> None:
    catalog = plant(tmp_path / "data", everything_wrong())
    store = ImageStore.pack(catalog, size_px=32)
    table = catalog.table.copy()
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    audit(catalog, store)
    pd.testing.assert_frame_equal(catalog.table, table)
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


# --- real X-rays -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Catalog, ImageStore]:
    """The 5,232 real X-rays as they came, packed small."""
    catalog = Catalog.scan(real_data / "chest_xray")
    return catalog, ImageStore.pack(catalog, size_px=32, cache=tmp_path_factory.mktemp("real"))


def test_real_data_divided_by_group_pass_and_their_copies_are_counted(real: tuple[Catalog, ImageStore]) -> None:
    catalog, store = real
    report = audit(catalog.split(Spec.preset_named().split, seed=42), store)
    assert_passed(report)
    findings = found(report)
    assert set(findings) == {"near-duplicate", "duplicate-content", "large-group", "class-imbalance", "kaggle-facts"}
    assert findings["duplicate-content"].count == 24
    assert "24 images (50 files)" in findings["duplicate-content"].sentence
    assert (findings["large-group"].count, findings["large-group"].examples[0]) == (13, "bacteria/23")
    assert findings["kaggle-facts"].sentence == (
        "By names and counts, the published 5,232 train images, divided anew (651 files in test), without the 624 of "
        "test: figures do not compare with published ones. Its 24 groups of byte-identical files (50 files) are there. "
        "All are 224 x 224 px, the published ones differ in size: these are made from them."
    )


def test_the_tutorial_passes_on_real_data_with_only_what_it_allows(real: tuple[Catalog, ImageStore]) -> None:
    spec = Spec.preset_named("tutorial")
    assert spec.audit.allow == ("group-across-validation",)
    catalog, store = real
    divided = catalog.split(spec.split, seed=spec.seed)
    report = audit(divided, store, allow=spec.audit.allow)
    assert_passed(report)
    rows = divided.rows()
    inside = rows[rows["split"] != "test"]
    for name, column in (("group-across-validation", "group"), ("content-across-validation", "image_id")):
        finding = found(report)[name]
        cut = int((inside.groupby(column)["split"].nunique() > 1).sum())
        assert (finding.severity, finding.count) == ("warning", cut)
        assert cut > 0
