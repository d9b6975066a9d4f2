"""The model card: true to the run, honest about what is not known, and no place for anybody's Markdown or HTML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pneumoscope import _files, card, scorecard
from pneumoscope.bundle import Bundle
from pneumoscope.card import NONE, TODO
from pneumoscope.catalog import Catalog
from pneumoscope.errors import RunError
from pneumoscope.evidence import Grid
from pneumoscope.predictions import Predictions
from pneumoscope.predictor import Description
from pneumoscope.runs import Run
from pneumoscope.specs import RESEARCH_USE, EvaluationSpec, Spec

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](http://evil.example)",
    "![x](http://evil.example/x.png)",
    "https://evil.example/a www.evil.example <http://evil.example>",
    "**bold** _em_ ~~gone~~ `code` ``more``",
    "a | b\n| --- |\n\n# head\n- item\r\n> quote",
    "&lt;b&gt; \\<b\\> \\*x*",
    "=cmd()|' /C calc'!A0",
    "[x]: http://evil.example 'title'",
    "{{ 7 * 7 }} {% raw %} $x^2$",
    "\u202eright to left\u202c \u0000\u001b[31m",
    "\udcff not UTF-8",
]

Made = Callable[..., Run]


@pytest.fixture
def made(tmp_path: Path, packed: tuple[Catalog, Any]) -> Made:
    """Write a run directory as far as the card reads it, without any network."""

    def make(
        *, data: str = "chest", note: str = "", models: tuple[str, ...] = ("cnn", "tl"), bootstrap: int = 40,
        splits: tuple[str, ...] = ("validation", "test"), group: str = "", published: str = "", one_label: bool = False,
    ) -> Run:  # fmt: skip
        run, spec = Run(tmp_path / "run"), Spec.preset_named("smoke")
        table = packed[0].table.copy()
        if group:
            table["group"] = table["group"].where(table["label"] == 0, group + table["group"])
        catalog = Catalog(packed[0].root, table)
        run.folder.mkdir()
        _files.write_text(run.spec_path, spec.to_toml())
        catalog.write(run.catalog_path)
        machine = {"versions": {"keras": "3"}, "cpu": "A & B <fast>", "cores": 4, "threads": 2, "gpus": ["Big|GPU"],
                   "memory_bytes": 8_000_000_000, "platform": "Linux"}  # fmt: skip
        run.update_manifest(
            data=f"/secret/place/{data}", note=note, data_hash="d" * 64, machine=machine, started="2026-01-01"
        )
        finding = {"name": "kaggle-facts", "severity": "note", "count": 64, "sentence": published, "examples": []}
        _files.write_json(run.audit_path, {"findings": [finding] if published else []})
        rows = {split: catalog.rows(split) for split in splits}
        if one_label:
            rows["test"] = rows["test"][rows["test"]["label"] == 1].reset_index(drop=True)
        scored = {name: {s: scores_of(part, seed=at) for s, part in rows.items()} for at, name in enumerate(models)}
        measured = scorecard.measure(
            scored, {"border-only": scored[models[0]]}, rows=rows, spec=EvaluationSpec(bootstrap=bootstrap)
        )
        looked = {"test_set": {"sentence": "These test images have been scored 3 times."}} if "test" in rows else {}
        _files.write_json(
            run.metrics_path, {"note": note, **measured.as_dict(), "shift": {"reason": f"lost: {data}"}, **looked}
        )
        for name, parts in scored.items():
            for split, part in parts.items():
                cells = part.table[["label", "score", "image_id", "path"]].itertuples(index=False)
                _files.write_csv(run.table_path(name, f"{split}_yscores"), ["y_true", "y_scores", "image_id", "path"],
                                 cells)  # fmt: skip
            run.update_stage(
                f"train-{name}", seconds=61.5, parts=2, epoch=3, epochs=9, best_epoch=2, machine=machine,
                parameters={"total": 1234567, "trainable": 89}, speed={"of": "images", "images_per_second": 12.34},
            )  # fmt: skip
        return run

    return make


def scores_of(rows: pd.DataFrame, *, seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    scores = np.clip(rows["label"] * 0.4 + rng.uniform(0.05, 0.55, len(rows)), 0, 1)
    return Predictions.of(rows, scores.to_numpy(dtype=np.float32))


def tokens(markdown: str) -> list[Token]:
    parsed = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    return [inner for token in parsed for inner in [token, *(token.children or [])]]


def structure(markdown: str) -> list[str]:
    return [token.type for token in tokens(markdown) if token.type not in ("text", "text_special")]


def shown(markdown: str) -> str:
    return "".join(token.content for token in tokens(markdown) if token.type in ("text", "text_special"))


# --- escaping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_shows_itself_and_does_nothing_else(text: str) -> None:
    markdown = f"a {card.escaped(text)} z"
    assert structure(markdown) == ["paragraph_open", "inline", "paragraph_close"]
    visible = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    assert shown(markdown) == f"a {visible} z"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_stays_in_its_cell(text: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| {card.escaped(text)} | end |\n"
    cells = [token for token in tokens(table) if token.type == "td_open"]
    assert len(cells) == 2
    assert not {"html_inline", "html_block", "link_open", "image", "code_inline", "em_open"} & set(structure(table))


def test_bare_addresses_are_no_links_to_those_who_look_for_them() -> None:
    text = card.escaped("see https://evil.example and www.evil.example")
    assert "://" not in text
    assert "www." not in text
    assert shown(text) == "see https://evil.example and www.evil.example"


def test_figures_have_their_interval_or_are_a_dash() -> None:
    assert card.figure(None, {"low": 0.1, "high": 0.2}) == NONE
    assert card.figure(0.91449, {"low": 0.88, "high": 0.9381}) == "0.914 (0.880–0.938)"
    assert card.figure(1.0, digits=0) == "1"
    assert card.escaped(None) == NONE


# --- the card of a run -----------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_knows(made: Made) -> None:
    run = made(published="By names and counts, the published images.")
    written = card.write_card(run)
    assert written == run.folder / "model_card.md"
    said = shown(text := written.read_text(encoding="utf-8"))
    for expected in (
        f"{RESEARCH_USE}.", "1,234,567", "3 of at most 9", "62 s in 2 part(s), 12.3 images/s", "A & B <fast>, 4 cores",
        "8.0 GB of memory", "Big|GPU", "CC BY 4.0", "children of one to five years", "Not for adults",
        "These test images have been scored 3 times.", "train.batch_size", "doi 10.17632/rscbjbr9sj",
    ):  # fmt: skip
        assert expected in said, expected
    measured = _files.read_json(run.metrics_path)["models"]["tl"]["test"]
    point = measured["operating_point"]
    interval = measured["group_intervals"]["auc"]
    assert f"{measured['auc']:.3f} ({interval['low']:.3f}–{interval['high']:.3f})" in said
    assert f"{point['threshold']:.4f}" in said
    assert text.count("### tl: measured") == 1
    counts = Catalog.read(run.catalog_path, root=run.folder).rows("train")
    bacteria = counts[counts["subtype"] == "bacteria"]
    assert f"| train | PNEUMONIA | bacteria | {len(bacteria)} | {bacteria['group'].nunique()} |" in text
    assert "html_block" not in structure(text)
    assert "html_inline" not in structure(text)


def test_the_card_says_whether_images_are_compressed_before_they_are_scored(made: Made) -> None:
    facts = card.facts_of(made())
    assert "compressed as a JPEG" not in card.text(facts)
    facts["spec"]["image"]["jpeg_quality"] = 60
    assert "compressed as a JPEG of quality 60 and decoded again" in " ".join(card.text(facts).split())


def test_the_card_gives_the_command_that_makes_such_a_run(made: Made) -> None:
    facts = card.facts_of(made())
    facts["data"]["name"] = "my data"
    facts["spec"] = (
        Spec.preset_named("best").with_overrides(["seed=7", 'models=["ft", "best"]']).model_dump(mode="json")
    )
    said = shown(card.text(facts))
    assert (
        "Made by: pneumoscope run 'my data' -o RUN --preset best --set seed=7 --set 'models=[\"ft\", \"best\"]'."
        in said
    )
    facts["spec"] = Spec.preset_named("best").model_dump(mode="json")
    assert "-o RUN --preset best." in shown(card.text(facts))
    facts["spec"]["preset"] = "of long ago"
    assert "Made by" not in card.text(facts)


def test_the_card_names_pairs_that_look_alike(made: Made) -> None:
    facts = card.facts_of(made())
    facts["data"]["findings"] = [{"name": "near-duplicate", "severity": "warning", "count": 3}]
    assert "two splits; 3 pairs of images under different names look alike" in card.text(facts)


def test_tables_are_whole(made: Made) -> None:
    text = card.text(card.facts_of(made()))
    blocks = [block for block in text.split("\n\n") if block.lstrip().startswith("| ")]
    assert len(blocks) == 10  # models, counts, settings, baselines; figures, calibration and subgroups of two models
    for block in blocks:
        lines = block.strip().splitlines()
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, block
    assert structure(text).count("table_open") == len(blocks)


def test_only_a_person_can_answer_what_no_run_knows(made: Made) -> None:
    text = card.text(card.facts_of(made()))
    checklist = text[text.index("## Checklist") :]
    for topic in ("Ethics", "eligible", "Who annotated", "Funding", "Clinical background", "Age, sex"):
        (line,) = [line for line in checklist.splitlines() if topic in line]
        assert TODO in line
    assert f"Source and licence: {TODO}." in text  # nobody's images that a run could know
    assert "Not for adults" not in text
    assert "children" not in text


@pytest.mark.parametrize(("note", "published"), [("SYNTHETIC DATA", "published"), ("SYNTHETIC DATA", "")])
def test_synthetic_images_are_never_given_out_as_the_published_ones(made: Made, note: str, published: str) -> None:
    text = card.text(card.facts_of(made(note=note, published=published)))
    assert "**SYNTHETIC DATA.**" in text
    assert "synthetic drawings, not radiographs" in text
    assert "Kermany" not in text


def test_undefined_figures_are_dashes_with_their_reasons(made: Made) -> None:
    text = card.text(card.facts_of(made(bootstrap=0, one_label=True)))
    (row,) = [line for line in text.splitlines() if line.startswith("| test | ")][-1:]
    assert NONE in row
    assert "Undefined:" in text
    assert "There is no NORMAL image." in text
    assert "nan" not in text.lower().replace("finance", "")
    assert "None" not in text
    validation = next(line for line in text.splitlines() if line.startswith("| validation |") and "/" in line)
    assert validation.count(") i |") == 4  # the shares, without a bootstrap; an AUC of 1 has no interval by formula


def test_a_run_without_test_images_says_so(made: Made) -> None:
    text = card.text(card.facts_of(made(splits=("validation",))))
    assert "No look at test images is recorded here." in text
    assert "on validation, the lowest score" in text


@pytest.mark.parametrize("name", [text.replace("/", ":").replace("\x00", "") for text in HOSTILE])
def test_hostile_names_change_no_structure(made: Made, name: str, tmp_path: Path) -> None:
    hostile = card.text(card.facts_of(made(data=name, group=f"{name}/", note=name)))
    (tmp_path / "run").rename(tmp_path / "hostile")
    harmless = card.text(card.facts_of(made(data="chest", group="x/", note="note")))
    assert structure(hostile) == structure(harmless)


def test_a_shared_card_names_no_place_and_no_series(made: Made) -> None:
    run = made(group="Smith-John/")
    assert "Smith-John" in json.dumps(card.facts_of(run))
    shared = json.dumps(card.facts_of(run, models=["tl"], shared=True))
    assert "Smith" not in shared
    assert "secret" not in shared
    assert "lost" not in shared
    assert '"cnn":' not in shared.split('"shortcuts"')[0].split('"models"')[-1]
    assert ".jpeg" not in shared


def test_a_card_that_a_person_went_on_with_is_not_written_over(made: Made) -> None:
    run = made()
    first = card.write_card(run)
    assert card.write_card(run) == first
    edited = first.read_text(encoding="utf-8").replace(TODO, "Dr. A", 1)
    first.write_text(edited, encoding="utf-8")
    second = card.write_card(run)
    assert second == run.folder / "model_card.new.md"
    assert first.read_text(encoding="utf-8") == edited
    assert TODO in second.read_text(encoding="utf-8")


def test_a_run_that_measured_nothing_has_no_card(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.update_manifest(status="stopped")
    with pytest.raises(RunError) as caught:
        card.write_card(run)
    assert str(caught.value) == (
        f"The run in {tmp_path} is stopped and measured no model yet; run it to its end first."
    )


def test_the_card_loads_neither_keras_nor_tables() -> None:
    program = "import sys, pneumoscope.card; print([n for n in ('keras', 'pandas', 'jinja2') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# --- the card of a bundle --------------------------------------------------------------------------------------------


def described(run: Run | None, **changes: Any) -> Description:
    measured = {} if run is None else _files.read_json(run.metrics_path)["models"]["tl"]
    kept = {split: {k: v for k, v in found.items() if k != "subgroups"} for split, found in measured.items()}
    spec = Spec.preset_named("smoke").model_dump(mode="json")
    known = {"exported": "2026-02-02", "data": "chest", "data_sha256": "d" * 64, "model_sha256": "m" * 64, "spec": spec}
    return Description("tl", "Transfer learning", 64, Grid(0, 32), 1.0, {"youden": 0.25}, "validation", None, None,
                       None, "", metrics=kept, provenance={**known, **changes})  # fmt: skip


def text_of(description: Description, **further: Any) -> str:
    return card.text_of_bundle({**description.as_dict(), **further})


def test_a_bundle_carries_the_card_of_its_model(made: Made) -> None:
    run = made(published="By names and counts, the published images.")
    parity = {"test": {"n": 16, "difference": 1e-6, "flipped": 0}}
    facts = card.facts_of(run, models=("tl",), shared=True)
    text = text_of(described(run), weights="float32", parity=parity, not_assessable={"test": 2}, card=facts)
    for expected in (
        "### tl: measured",
        "0 calls differ. It calls 2 of them not assessable.",
        "youden 0.2500",
        "at most 1.0e-06 apart",
        "Not for adults",
        "| test | subtype |",
    ):
        assert expected in text
    for absent in ("### cnn", "series", "`gallery`"):
        assert absent not in text
    assert "html_block" not in structure(text)


def test_figures_that_a_bundle_no_longer_stands_by_are_left_out(made: Made) -> None:
    run = made()
    facts = card.facts_of(run, models=("tl",), shared=True)
    moved = {"date": "2026-03-03", "n": 200, "n_positive": 80}
    for text in (
        text_of(described(run), weights="int8", card=facts),
        text_of(described(run, recalibrated=[moved]), weights="float32", card=facts),
    ):
        assert "No figures by subgroup are recorded here." in text
        assert "Carried to test" not in text
    assert "Recalibrated 2026-03-03 on 200 images of a site (80 PNEUMONIA)" in text


def test_an_older_bundle_without_facts_still_gets_a_card(made: Made) -> None:
    text = text_of(described(None))
    assert "Counts by split and label are not recorded here." in text
    assert "No baselines are recorded here." in text
    assert f"Source and licence: {TODO}." in text
    assert "None" not in text


def test_a_bundle_opens_without_a_card_and_with_one_that_a_person_went_on_with(tmp_path: Path) -> None:
    bundle = Bundle.write(tmp_path / "bundle", network=b"network", description=described(None))
    path = bundle.folder / "model_card.md"
    assert path.read_text(encoding="utf-8").startswith("# Model card")
    path.write_text("mine")
    assert Bundle.open(bundle.folder).content == bundle.content
    Bundle.write(bundle.folder, network=b"other", description=described(None))
    assert path.read_text() == "mine"
    path.unlink()
    assert Bundle.open(bundle.folder).network_bytes() == b"other"
