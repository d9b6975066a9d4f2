"""The survey: how images are read, what is said of them before any training, and what is drawn."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from pneumoscope import _files, appearance, figures, phantom, survey
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, SpecError, UsageError
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import LABELS, Spec
from pneumoscope.store import ImageStore

DATA_FIGURES = {
    f"{split}_{what}.png"
    for split in ("train", "test")
    for what in ("samples_normal", "samples_pneumonia", "data_dist_barplot", "data_dist_pieplot")
}


def spec_of(*settings: str) -> Spec:
    return Spec.preset_named("smoke").with_overrides(["image.size_px=32", *settings])


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def noise(*seed: int, side_px: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (side_px, side_px), dtype=np.uint8)


def real_looking(folder: Path, *, each: int = 3) -> Path:
    """Write images that are not synthetic chests, under names that tell each one's patient; none resembles another."""
    names = {0: "IM-{:04d}-0001.jpeg", 1: "person{}_virus_1.jpeg"}
    for at, (split, label, _) in enumerate(itertools.product(("train", "test"), (0, 1), range(each))):
        path = folder / split / LABELS[label] / names[label].format(at + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(at)).save(path)
    return folder


@pytest.fixture
def voice() -> tuple[Narration, io.StringIO]:
    stream = io.StringIO()
    return Narration("plain", stream=stream), stream


# --- reading ---------------------------------------------------------------------------------------------------------


def test_images_are_listed_packed_and_divided_and_their_counts_said(
    tiny_set: Path, voice: tuple[Narration, io.StringIO]
) -> None:
    spec = spec_of()
    catalog, store = survey.read_images(spec, tiny_set, voice[0])
    expected = Catalog.scan(tiny_set).split(spec.split, seed=spec.seed)
    pd.testing.assert_frame_equal(catalog.table, expected.table)
    assert store.size_px == 32
    assert len(store.rows_of(catalog.rows())) == 64
    said = [line.split() for line in voice[1].getvalue().splitlines()]
    at = said.index(["split", "NORMAL", "PNEUMONIA", "total"])
    counts = expected.counts()
    assert said[at + 1 : at + 4] == [
        [split, *map(str, row)] for split, row in zip(counts.index, counts.to_numpy(), strict=True)
    ]
    assert said[at + 4] == ["all", *(str(total) for total in counts.sum())] == ["all", "19", "45", "64"]


def test_images_can_be_read_without_being_divided(tiny_set: Path) -> None:
    catalog, _ = survey.read_images(spec_of(), tiny_set, Narration("silent"), divide=False)
    assert set(catalog.table["split"]) == {"train", "test"}


def test_what_is_left_out_or_odd_is_said(tmp_path: Path, voice: tuple[Narration, io.StringIO]) -> None:
    given = real_looking(tmp_path / "set")
    whole = next(iter(sorted((given / "train" / "NORMAL").iterdir()))).read_bytes()
    (given / "train" / "NORMAL" / "IM-0090-0001.jpeg").write_bytes(whole[: len(whole) // 2])
    (given / "train" / "NORMAL" / "IM-0091-0001.jpeg").write_bytes(b"<html>")
    (given / "train" / "NORMAL" / "who.jpeg").write_bytes(b"")
    Image.fromarray(noise(99)).save(given / "train" / "NORMAL" / "whose.jpeg")
    (given / "notes.txt").write_text("x", encoding="utf-8")
    catalog, store = survey.read_images(spec_of(), given, voice[0])
    reasons = catalog.quarantined()["status"].value_counts()
    assert reasons.sum() == 3
    assert len(catalog.rows()) == 13
    assert not set(store.rejected) & set(catalog.rows()["image_id"])
    said = voice[1].getvalue().splitlines()
    listed = ", ".join(f"1 {reason}" for reason in reasons.index)
    assert f"Warning: 3 files are left out ({listed}); catalog.csv lists them." in said
    assert "  Ignored: 1 other files." in said
    assert "  2 of 16 names tell no patient; each of these images is its own group." in said


def one_class(folder: Path) -> Path:
    given = real_looking(folder)
    shutil.rmtree(given / "train" / "PNEUMONIA")
    return given


def test_a_set_that_no_model_can_learn_from_is_refused_unless_it_is_only_looked_at(tmp_path: Path) -> None:
    given = one_class(tmp_path / "set")
    with pytest.raises(
        DataError, match=r"hold no usable PNEUMONIA image \(\d images in all\), but a model learns from"
    ):
        survey.read_images(spec_of(), given, Narration("silent"))
    catalog, _ = survey.read_images(spec_of(), given, Narration("silent"), learnable=False)
    assert catalog.counts().loc["train", "PNEUMONIA"] == 0


# --- what must stand on every output ---------------------------------------------------------------------------------


def zipped(data: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(data.rglob("*.jpeg")):
            archive.write(path, path.relative_to(data))
    return target


def listed(data: Path, target: Path) -> Path:
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(data.rglob("*.jpeg"))]
    target.write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    return target


def unnamed(data: Path, target: Path) -> Path:
    shutil.copytree(data, target, ignore=shutil.ignore_patterns(phantom.NOTICE_NAME, "phantom.json"))
    return target


@pytest.mark.parametrize(("kind", "name"), [(zipped, "set.zip"), (listed, "set.csv"), (unnamed, "set")])
def test_synthetic_images_are_known_in_whatever_they_come(
    tiny_set: Path, tmp_path: Path, kind: Callable[[Path, Path], Path], name: str
) -> None:
    given = kind(tiny_set, tmp_path / name)
    assert survey.note_of(spec_of(), given, catalog=Catalog.scan(given)) == "SYNTHETIC DATA"


def test_images_beside_the_notice_are_synthetic_whoever_saved_them_again(tmp_path: Path) -> None:
    given = real_looking(tmp_path / "set")
    (given / phantom.NOTICE_NAME).write_text("SYNTHETIC", encoding="utf-8")
    assert survey.note_of(spec_of(), given, catalog=Catalog.scan(given)) == "SYNTHETIC DATA"


def test_a_list_that_mixes_synthetic_images_in_is_called_synthetic(tiny_set: Path, tmp_path: Path) -> None:
    given = real_looking(tmp_path / "set")
    assert survey.note_of(spec_of(), given, catalog=Catalog.scan(given)) == ""
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(given.rglob("train/*/*.jpeg"))]
    rows += [f"{path},{path.parent.name},test" for path in sorted((tiny_set / "test").rglob("*.jpeg"))]
    manifest = tmp_path / "set.csv"
    manifest.write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    assert survey.note_of(spec_of(), manifest, catalog=Catalog.scan(manifest)) == "SYNTHETIC DATA"


def test_random_weights_are_named_only_for_the_approaches_that_use_them(tiny_set: Path) -> None:
    spec, catalog = spec_of("backbone.weights=none"), Catalog.scan(tiny_set)
    random = "SYNTHETIC DATA, tl and ft on RANDOM WEIGHTS"
    assert survey.note_of(spec, tiny_set, catalog=catalog) == random
    assert survey.note_of(spec, tiny_set, catalog=catalog, models_used=["ft"]) == "SYNTHETIC DATA, ft on RANDOM WEIGHTS"
    assert survey.note_of(spec, tiny_set, catalog=catalog, models_used=["cnn"]) == "SYNTHETIC DATA"
    assert survey.note_of(spec, tiny_set, catalog=catalog, models_used=()) == "SYNTHETIC DATA"
    assert survey.note_of(spec.with_overrides(["models=cnn"]), tiny_set, catalog=catalog) == "SYNTHETIC DATA"


# --- inspecting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One call of a function of `figures`."""

    function: str
    title: str
    content: Any
    options: dict[str, Any]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """What is drawn is noted, and drawn all the same."""
    notes: list[Drawn] = []

    def noting(name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def and_draw(content: Any, **options: Any) -> Any:
            notes.append(Drawn(name, options["title"], content, options))
            return draw(content, **options)

        return and_draw

    for name in ("class_bars", "class_pie", "sample_grid", "pairs"):
        monkeypatch.setattr(figures, name, noting(name, getattr(figures, name)))
    return notes


def test_the_distributions_and_grids_are_drawn_from_all_images(
    tiny_set: Path, tmp_path: Path, drawn: list[Drawn], capsys: pytest.CaptureFixture[str]
) -> None:
    survey.inspect(tiny_set, tmp_path / "look", spec=spec_of("backbone.weights=none"))
    assert capsys.readouterr() == ("", "")  # nobody listens
    catalog = Catalog.scan(tiny_set)
    store = ImageStore.pack(catalog, size_px=32)
    by_name = catalog.rows().assign(name=lambda rows: rows["path"].map(lambda path: Path(path).name)).set_index("name")
    for split, title in (("train", "Training images"), ("test", "Test images")):
        names = {label: {path.name for path in (tiny_set / split / label).iterdir()} for label in LABELS}
        counts = {label: len(found) for label, found in names.items()}
        of_split = [(one.function, one.content) for one in drawn if one.title == title]
        assert of_split == [("class_bars", counts), ("class_pie", counts)]
        for label, found in names.items():
            (grid,) = (one for one in drawn if one.title == f"{label}, {split} images")
            captions = grid.options["captions"]
            assert len(set(captions)) == len(captions) == min(survey.SAMPLES, len(found))
            assert set(captions) <= found
            shown = store.images[store.rows_of(by_name.loc[captions])]
            np.testing.assert_array_equal(np.stack(grid.content), shown)
    assert {one.options["note"] for one in drawn} == {"SYNTHETIC DATA"}  # nothing here was computed with weights


def test_inspect_lists_and_draws_the_images_and_trains_nothing(
    tiny_set: Path, tmp_path: Path, voice: tuple[Narration, io.StringIO]
) -> None:
    folder = tmp_path / "look"
    catalog = survey.inspect(tiny_set, folder, spec=spec_of("backbone.weights=none"), narration=voice[0])
    assert files_under(folder) == {"catalog.csv"} | {f"figures/{name}" for name in DATA_FIGURES}
    written = Catalog.read(folder / "catalog.csv", root=tiny_set)
    pd.testing.assert_frame_equal(written.table, catalog.table)
    assert set(catalog.table["split"]) == {"train", "validation", "test"}
    said = voice[1].getvalue()
    assert "RANDOM" not in said
    assert said.splitlines()[-1] == (
        f"Pictures are in {folder / 'figures'}, the list of images in {folder / 'catalog.csv'}."
    )


# --- auditing --------------------------------------------------------------------------------------------------------


def with_near_duplicate(folder: Path) -> Path:
    """Ordinary images, and one of them again as another patient's, saved a little worse."""
    given = real_looking(folder)
    chest = Image.fromarray(phantom.draw(0, seed=5, width_px=96, height_px=80))
    chest.save(given / "train" / "NORMAL" / "IM-0200-0001.jpeg", quality=95)
    chest.save(given / "test" / "NORMAL" / "IM-0201-0001.jpeg", quality=80)
    return given


def test_a_runs_list_of_images_and_audit_are_not_replaced(tiny_set: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", resume=False)
    run.update_manifest(status="finished")
    for look in (survey.inspect, survey.audit_images):
        with pytest.raises(UsageError, match=r"run is a run, whose list of images and audit belong to its models; "):
            look(tiny_set, run.folder, spec=spec_of())
    assert not run.catalog_path.exists()
    assert not run.audit_path.exists()


def test_what_an_audit_finds_is_said_and_kept(tmp_path: Path, voice: tuple[Narration, io.StringIO]) -> None:
    given, folder = with_near_duplicate(tmp_path / "set"), tmp_path / "found"
    found = survey.audit_images(given, folder, spec=spec_of(), narration=voice[0])
    assert [(finding.name, finding.severity) for finding in found.findings] == [
        ("near-duplicate", "warning"),
        ("kaggle-facts", "note"),
    ]
    said = voice[1].getvalue().splitlines()
    at = said.index("Audit")
    assert [line.split() for line in said[at + 1 : at + 4]] == [
        ["finding", "severity", "count"],
        ["near-duplicate", "warning", "1"],
        ["kaggle-facts", "note", "14"],
    ]
    assert said[at + 4 :] == [f"  {finding.name}: {finding.sentence}" for finding in found.findings]
    assert files_under(folder) == {"audit.json", "figures/near_duplicates.png"}
    content = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert content == {"schema_version": 1, **_files.jsonable(found.as_dict())}
    assert (content["passed"], content["n_images"]) == (True, 14)


def test_near_duplicates_are_drawn_side_by_side(tmp_path: Path, drawn: list[Drawn]) -> None:
    given = with_near_duplicate(tmp_path / "set")
    survey.audit_images(given, tmp_path / "found", spec=spec_of())
    (picture,) = drawn
    assert (picture.function, picture.options["note"]) == ("pairs", "")
    assert picture.title == "Near-duplicates to look at (1 of 1 pairs)"
    ((one, two),), (captions,) = picture.content, picture.options["captions"]
    assert set(captions) == {"IM-0200-0001.jpeg", "IM-0201-0001.jpeg"}
    catalog = Catalog.scan(given)
    store = ImageStore.pack(catalog, size_px=32)
    for pixels, caption in zip((one, two), captions, strict=True):
        rows = catalog.rows()
        (row,) = store.rows_of(rows[rows["path"].str.endswith(caption)])
        np.testing.assert_array_equal(pixels, store.images[row])
    with Image.open(tmp_path / "found" / "figures" / "near_duplicates.png") as saved:
        assert min(saved.size) > 300


def test_no_more_pairs_are_drawn_than_a_picture_holds_and_all_are_counted(
    tmp_path: Path, drawn: list[Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appearance, "MAX_PAIRS", 30)  # listed; more are only counted
    given = real_looking(tmp_path / "set")
    chest = Image.fromarray(phantom.draw(0, seed=5, width_px=96, height_px=80))
    for at in range(10):  # each resembles each other
        chest.save(given / "train" / "NORMAL" / f"IM-{300 + at:04d}-0001.jpeg", quality=50 + 5 * at)
    found = survey.audit_images(given, tmp_path / "found", spec=spec_of())
    pairs = 10 * 9 // 2
    assert len(found.pairs) == 30
    assert {finding.name: finding.count for finding in found.findings}["near-duplicate"] == pairs
    (picture,) = drawn
    assert len(picture.content) == figures.MAX_PAIRS < pairs
    assert picture.title == f"Near-duplicates to look at ({figures.MAX_PAIRS} of {pairs} pairs)"


def test_sound_images_are_said_to_be_so_and_need_no_picture(
    tmp_path: Path, voice: tuple[Narration, io.StringIO]
) -> None:
    given = tmp_path / "list.csv"
    lines = ["path,label,split,group"]
    for at, (split, label) in enumerate(itertools.product(("train", "validation", "test"), LABELS)):
        Image.fromarray(noise(at)).save(tmp_path / f"{at}.png")
        lines.append(f"{at}.png,{label},{split},patient {at}")
    given.write_text("\n".join(lines), encoding="utf-8")
    found = survey.audit_images(given, tmp_path / "found", spec=spec_of(), narration=voice[0])
    assert found.findings == ()
    assert voice[1].getvalue().splitlines()[-1] == "  The audit found nothing to report."
    assert files_under(tmp_path / "found") == {"audit.json"}


def test_an_audit_without_a_folder_writes_nothing_beside_the_cache(tmp_path: Path, own_cache: Path) -> None:
    given = with_near_duplicate(tmp_path / "set")
    before = files_under(given)
    assert survey.audit_images(given, None, spec=spec_of()).exit_status == 0
    assert files_under(given) == before
    assert {path.name for path in tmp_path.iterdir()} == {"set", own_cache.name}


def test_a_leak_is_reported_and_not_raised(tmp_path: Path, voice: tuple[Narration, io.StringIO]) -> None:
    given = real_looking(tmp_path / "set")
    leak = next(iter(sorted((given / "train" / "NORMAL").iterdir())))
    shutil.copy(leak, given / "test" / "NORMAL" / "IM-0400-0001.jpeg")
    found = survey.audit_images(given, tmp_path / "found", spec=spec_of(), narration=voice[0])
    assert found.exit_status == 1
    assert [finding.name for finding in found.refusals] == ["content-across-test", "group-across-test"]
    assert json.loads((tmp_path / "found" / "audit.json").read_text(encoding="utf-8"))["passed"] is False
    assert ["content-across-test", "error", "1"] in [line.split() for line in voice[1].getvalue().splitlines()]


def test_a_set_that_no_model_can_learn_from_is_audited_all_the_same(tmp_path: Path) -> None:
    found = survey.audit_images(one_class(tmp_path / "set"), None, spec=spec_of())
    assert [finding.name for finding in found.refusals] == ["class-missing"]


def test_findings_that_the_spec_allows_stop_no_run(tmp_path: Path) -> None:
    given = real_looking(tmp_path / "set")
    child = next(iter(sorted((given / "train" / "NORMAL").iterdir())))
    shutil.copy(child, given / "train" / "PNEUMONIA" / child.name)
    assert [one.name for one in survey.audit_images(given, None, spec=spec_of()).refusals] == ["two-labels"]
    allowed = survey.audit_images(given, None, spec=spec_of("audit.allow=two-labels"))
    assert allowed.exit_status == 0
    assert ("two-labels", "warning") in [(one.name, one.severity) for one in allowed.findings]
    with pytest.raises(SpecError, match=r"^--set: audit\.allow = \['group-across-test'\] is not valid: only "):
        survey.audit_images(given, None, spec=spec_of("audit.allow=group-across-test"))


def test_a_damaged_image_is_counted_by_the_audit(tmp_path: Path) -> None:
    given = real_looking(tmp_path / "set")
    whole = next(iter(sorted((given / "train" / "NORMAL").iterdir()))).read_bytes()
    (given / "train" / "NORMAL" / "IM-0090-0001.jpeg").write_bytes(whole[: len(whole) // 2])
    found = survey.audit_images(given, tmp_path / "found", spec=spec_of())
    assert {one.name: one.count for one in found.findings}["unreadable"] == 1
    assert len(found.measures) == 12


def test_pictures_of_near_duplicates_bear_the_note(tiny_set: Path, tmp_path: Path, drawn: list[Drawn]) -> None:
    given = shutil.copytree(tiny_set, tmp_path / "set")
    child = next(iter(sorted((given / "train" / "NORMAL").iterdir())))
    with Image.open(child) as image:
        image.save(given / "train" / "NORMAL" / "IM-9000-0001.jpeg", quality=60)
    survey.audit_images(given, tmp_path / "found", spec=spec_of("backbone.weights=none"))
    (picture,) = drawn
    assert picture.options["note"] == "SYNTHETIC DATA"  # nothing here was computed with weights
