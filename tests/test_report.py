"""The report: what its first screen says, what stands where something is missing, and that nothing in it can run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import reported
from pneumoscope import _report_compare, _report_head, _report_measures, report
from pneumoscope._report_blocks import Section, plain
from pneumoscope._report_material import is_plain_name, read
from pneumoscope.errors import RunError, StoreError, UsageError
from pneumoscope.report import MAX_BYTES, sections, write_comparison, write_report
from pneumoscope.runs import Run
from pneumoscope.specs import RESEARCH_USE

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">"\'&\n=cmd()\u202e'
VOID = {"meta", "img", "br", "input", "link", "hr"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A measured run with three approaches; never write into it."""
    return reported.make(tmp_path_factory.mktemp("made") / "first")


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of it to change."""
    return Run(Path(shutil.copytree(made.folder, tmp_path / "run")))


class Page(HTMLParser):
    """Elements, attributes and texts of a page; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    @property
    def said(self) -> str:
        """All text that a person reads, spaces and line ends as one space."""
        parts = [text for tag, found in self.texts.items() if tag not in ("script", "style") for text in found]
        return " ".join(" ".join(parts).split())


def page_of(run: Run) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def section(run: Run, name: str) -> Section:
    (found,) = (one for one in sections(read(run), room=10**6) if one.name == name)
    return found


# --- the first screen ------------------------------------------------------------------------------------------------


def test_the_headline_is_the_model_with_the_best_validation_auc_and_shows_its_test_figures(run: Run) -> None:
    metrics = json.loads(run.metrics_path.read_text())
    by_validation = {name: parts["validation"]["auc"] for name, parts in metrics["models"].items()}
    best = max(by_validation, key=by_validation.__getitem__)
    head = _report_head.head(read(run))
    assert head.model.endswith(f"({best})")
    assert head.tiles[0].value == f"{metrics['models'][best]['test']['auc']:.3f}"
    point = metrics["models"][best]["test"]["operating_point"]
    assert head.tiles[1].meaning.startswith(f"{point['false_negatives']} of 36 PNEUMONIA missed")
    assert head.tiles[2].value == f"{100 * point['specificity']:.1f}\u00a0%"


def test_no_test_figure_changes_which_model_is_chosen(run: Run) -> None:
    before, _ = _report_head.chosen(read(run))
    metrics = json.loads(run.metrics_path.read_text())
    for name, parts in metrics["models"].items():
        parts["test"]["auc"] = 0.1 if name == before else 0.99
    run.metrics_path.write_text(json.dumps(metrics))
    after, why = _report_head.chosen(read(run))
    assert after == before
    assert "test images had no part in the choice" in why


def test_every_approach_and_baseline_stands_beside_the_others_with_intervals(run: Run) -> None:
    metrics = json.loads(run.metrics_path.read_text())
    table = _report_head.approaches(read(run))
    assert [row[0].text for row in table.rows] == [
        "CNN from scratch (cnn)", "Transfer learning (tl)", "Fine-tuning (ft)", "file-and-grey", "border-only"
    ]  # fmt: skip
    found = metrics["models"]["tl"]["test"]
    shown = table.rows[1][5]
    assert shown.text == f"{found['auc']:.3f}"
    by_patient = found["group_intervals"]["auc"]
    assert shown.small == f"{by_patient['low']:.3f}–{by_patient['high']:.3f}"


def test_an_interval_that_the_bootstrap_does_not_give_comes_from_the_formula(tmp_path: Path) -> None:
    run = reported.make(tmp_path / "plain", bootstrap=0)
    found = json.loads(run.metrics_path.read_text())["models"]["tl"]["test"]
    shown = _report_head.approaches(read(run)).rows[1][5]
    assert shown.small == f"{found['auc_interval']['low']:.3f}–{found['auc_interval']['high']:.3f}"
    head = _report_head.head(read(run))
    assert any("were not compared: there was no bootstrap" in sentence for sentence in head.verdicts)
    assert "no bootstrap" in section(run, "uncertainty").missing


def test_verdicts_say_which_models_can_be_told_apart_whatever_the_order_in_the_file(run: Run) -> None:
    metrics = json.loads(run.metrics_path.read_text())
    best = _report_head.chosen(read(run))[0]
    one, two = (name for name in metrics["models"] if name != best)
    for split in ("validation", "test"):
        metrics["comparisons"][split] = [
            {"first": one, "second": best, "verdict": "worse"},
            {"first": best, "second": two, "verdict": "cannot be told apart at this n"},
            {"first": best, "second": "border-only", "verdict": "better"},
            {"first": one, "second": "border-only", "verdict": "cannot be told apart at this n"},
        ]
    run.metrics_path.write_text(json.dumps(metrics))
    verdicts = _report_head.head(read(run)).verdicts
    told = f"{best} is better than {one} and cannot be told apart from {two} with this many images."
    assert verdicts[0] == f"On validation, {told}"
    assert verdicts[1] == f"On test, {told}"
    assert f"On test, {one} is not shown to beat border-only, which sees no lung." in verdicts


WARNINGS: dict[str, tuple[Callable[[Run], object], str, str]] = {
    "synthetic": (
        lambda run: reported.change(run.metrics_path, note="Synthetic images"),
        "grave", "Synthetic images: the figures say nothing about real X-rays.",
    ),
    "status": (
        lambda run: reported.change(run.manifest_path, status="failed", error="The disk is full."),
        "grave", "This run is failed, not finished: The disk is full.",
    ),
    "random weights": (
        lambda run: run.spec_path.write_text(run.spec_path.read_text().replace('"imagenet"', '"none"')),
        "grave", "The backbone began with random weights: nothing is transferred from it.",
    ),
    "allowed leak": (
        lambda run: (
            run.spec_path.write_text(run.spec_path.read_text().replace("allow = []", 'allow = ["near-duplicate"]'))
        ),
        "grave", "A leak was allowed by name: near-duplicate (1 found).",
    ),
    "audit": (lambda run: None, "mind", "The audit of the data warns of near-duplicate."),
    "no audit": (
        lambda run: run.audit_path.unlink(), "mind", "The data were not audited: The run holds no audit.json.",
    ),
    "shift": (
        lambda run: None,
        "mind", "Test images differ from training images (NORMAL): expect other figures elsewhere too.",
    ),
    "moved": (
        lambda run: reported.change(run.metrics_path, moved={"tl": {"sensitivity": {"verdict": "fell"}}}),
        "mind", "From where thresholds were chosen to test, tl's sensitivity fell.",
    ),
    "chosen on validation": (
        lambda run: None,
        "mind", "Thresholds come from the validation images, which also steered the training: their figures flatter.",
    ),
    "ledger": (
        lambda run: None,
        "fine", "These test images were scored 3 times on this machine by 3 models of 1 configuration.",
    ),
    "no ledger": (
        lambda run: reported.change(run.metrics_path, test_set=None),
        "mind", "How often these test images were looked at is not known.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_what_stands_against_the_figures_is_said_on_the_first_screen(run: Run, name: str) -> None:
    spoil, level, sentence = WARNINGS[name]
    spoil(run)
    found = _report_head.warnings(read(run))
    assert (level, sentence) in [(one.level, one.sentence) for one in found]
    order = ["grave", "mind", "fine"]
    assert [order.index(one.level) for one in found] == sorted(order.index(one.level) for one in found)
    assert {one.section for one in found} <= {one.name for one in sections(read(run), room=0)}


# --- a run that is not whole -----------------------------------------------------------------------------------------


def test_a_run_of_which_one_approach_was_stopped_is_shown_with_the_reason(tmp_path: Path) -> None:
    run = reported.make(tmp_path / "half", models=("cnn", "tl"))
    reported.change(run.manifest_path, status="failed", error="ft was not trained.")
    page = page_of(run)
    assert "Fine-tuning (ft) was not measured: The disk is full." in page.said
    assert "This run is failed, not finished: ft was not trained." in page.said
    assert "Transfer learning (tl)" in page.said


def test_a_run_that_has_measured_nothing_has_no_report(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "young")
    run.update_manifest(status="running")
    with pytest.raises(RunError, match=r"is running and has measured nothing yet .*--resume"):
        write_report(run)
    run.metrics_path.write_text('{"schema_version": 1, "models": {}}')
    with pytest.raises(RunError, match=r"holds the figures of no model; score the run again"):
        write_report(run)
    assert not run.report_path.exists()


def test_damaged_metrics_are_refused_in_one_sentence_and_an_earlier_report_stays(run: Run) -> None:
    write_report(run)
    run.metrics_path.write_text("{")
    with pytest.raises(StoreError, match=r"metrics\.json cannot be read as JSON"):
        write_report(run)
    assert run.report_path.exists()


MISSING: dict[str, tuple[Callable[[Run], object], str, str]] = {
    "catalog": (lambda run: run.catalog_path.unlink(), "data", "The run holds no catalog.csv."),
    "epochs": (
        lambda run: [path.rename(f"{path}.gone") for path in run.folder.glob("tables/*per_epoch.csv")],
        "learning", "The run holds no usable tables of loss and accuracy per epoch.",
    ),
    "tables": (
        lambda run: shutil.rmtree(run.folder / "tables"),
        "curves", "The run holds no usable tables of scores and ROC points.",
    ),
    "calibration": (lambda run: strip(run, "calibration"), "calibration", "Calibration was not measured."),
    "counts": (
        lambda run: strip(run, "true_negatives", "operating_point"), "counts", "metrics.json holds no counts.",
    ),
    "subgroups": (lambda run: strip(run, "subgroups"), "subgroups", "No subgroups were measured"),
    "decision": (lambda run: strip(run, "decision_curve"), "decision", "No decision curve was computed."),
    "comparisons": (
        lambda run: reported.change(run.metrics_path, comparisons={}), "uncertainty", "not compared in pairs",
    ),
    "shift": (lambda run: reported.change(run.metrics_path, shift=None, not_assessable=None), "shift", "not measured"),
    "untested shift": (
        lambda run: reported.change(run.metrics_path, shift={"reason": "No weights."}, not_assessable=None),
        "shift", "No weights.",
    ),
    "gallery": (lambda run: shutil.rmtree(run.folder / "gallery"), "gallery", "The run holds no gallery of pictures."),
    "gallery's reason": (
        lambda run: reported.change(run.gallery_path, reason="The images are gone."), "gallery", "The images are gone.",
    ),
    "damaged gallery": (lambda run: run.gallery_path.write_text("["), "gallery", "cannot be read as JSON"),
    "odd gallery": (
        lambda run: reported.change(run.gallery_path, models=[1]),
        "gallery", "gallery.json is damaged: it names no models",
    ),
    "checks": (lambda run: None, "checks", "The maps were not checked; pneumoscope explain"),
    "repeats": (lambda run: None, "repeats", "The run was made once: --folds K and --seeds N repeat it."),
    "stages": (lambda run: shutil.rmtree(run.folder / "stages"), "cost", "The run holds no records of its stages."),
    "spec": (lambda run: run.spec_path.unlink(), "reproduce", "The command is not known: The run holds no spec.toml."),
    "damaged spec": (lambda run: run.spec_path.write_text("= ="), "provenance", "spec.toml is damaged"),
}  # fmt: skip


def strip(run: Run, *keys: str) -> None:
    """Take keys out of every split's figures, as an earlier version left them."""
    content = json.loads(run.metrics_path.read_text())
    for parts in content["models"].values():
        for figures in parts.values():
            for key in keys:
                figures.pop(key)
    run.metrics_path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", MISSING)
def test_a_section_without_its_material_says_why_in_one_line(run: Run, name: str) -> None:
    spoil, of, line = MISSING[name]
    spoil(run)
    found = section(run, of)
    assert line in found.missing
    assert "\n" not in found.missing
    assert plain(found.missing[:60], longest=10**6) in page_of(run).said


def test_every_section_stands_in_the_contents_and_on_the_page(run: Run) -> None:
    page = page_of(run)
    names = [one.name for one in sections(read(run), room=10**6)]
    anchors = {found["id"] for tag, found in page.elements if tag == "section" and "id" in found}
    links = {found["href"] for tag, found in page.elements if tag == "a" and "href" in found}
    assert set(names) <= anchors
    assert {f"#{name}" for name in names} <= links
    assert {link[1:] for link in links} <= anchors | {"main"}
    assert RESEARCH_USE in page.said


def test_a_run_whose_every_value_is_of_another_type_is_still_shown(run: Run) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(part) for key, part in value.items()}
        return [] if isinstance(value, str) else "odd" if isinstance(value, (int, float)) else {"a": [None, 1e999]}

    for path in (run.metrics_path, run.audit_path, run.gallery_path):
        content = json.loads(path.read_text())
        content = {key: value if key == "schema_version" else turned(value) for key, value in content.items()}
        path.write_text(json.dumps(content))
    assert "–" in page_of(run).said


def test_repeats_and_checks_of_evidence_are_shown_where_the_run_holds_them(run: Run) -> None:
    figures = {"mean": 0.9, "min": 0.8, "max": 0.95}
    content = {
        "folds": {
            "folds": 3, "sentences": ["cnn: folds."],
            "models": {"cnn": {"out_of_fold": {"auc": 0.91, "accuracy": 0.8}, "auc_by_fold": [0.9, None]}},
        },
        "seeds": {
            "seeds": [42, 43], "split": "test", "best": {"cnn": 2}, "sentences": ["cnn: seeds."],
            "models": {"cnn": {"auc": figures, "sensitivity": figures, "specificity": figures}},
        },
    }  # fmt: skip
    run.repeats_path.write_text(json.dumps({"schema_version": 1, **content}))
    (run.folder / "evidence").mkdir()
    checks = {"schema_version": 1, "model": "ft", "n": 64, "verdicts": ["The maps follow the weights."]}
    (run.folder / "evidence" / "evidence_checks.json").write_text(json.dumps(checks))
    said = page_of(run).said
    for part in ("Cross-validation, 3 folds by patient", "0.900, –", "Mean and range over 2 seeds", "0.800 to 0.950",
                 "cnn: seeds.", "The maps follow the weights.", "--folds 3 --seeds 2"):  # fmt: skip
        assert part in said


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_kept_epoch_is_the_last_that_gained_more_than_min_delta(run: Run) -> None:
    material = read(run)
    assert _report_measures.best_epoch(material, "cnn") == 2  # 0.6, 0.4, 0.45
    run.table_path("cnn", "loss_per_epoch").write_text("epoch,train_loss,val_loss\n1,1,0.5\n2,1,\n3,1,0.49999999\n")
    assert _report_measures.best_epoch(read(run), "cnn") == 1
    run.table_path("cnn", "loss_per_epoch").unlink()
    assert _report_measures.best_epoch(read(run), "cnn") is None


def test_the_kept_epoch_of_a_rate_that_falls_to_0_is_the_last_and_what_was_noted_counts_first(run: Run) -> None:
    spec = run.spec_path.read_text(encoding="utf-8")
    run.spec_path.write_text(spec.replace('schedule = "plateau"', 'schedule = "cosine"'), encoding="utf-8")
    assert _report_measures.best_epoch(read(run), "cnn") == 3  # 0.6, 0.4, 0.45
    run.update_stage("train-cnn", best_epoch=1)
    assert _report_measures.best_epoch(read(run), "cnn") == 1


def test_a_fold_is_shown_by_what_chose_no_threshold(run: Run) -> None:
    content = json.loads(run.metrics_path.read_text(encoding="utf-8"))
    for parts in content["models"].values():
        parts["calibration"] = parts.pop("test")  # as where the test images were left alone
    run.metrics_path.write_text(json.dumps(content), encoding="utf-8")
    material = read(run)
    assert material.splits[-1] == "calibration"
    assert _report_head.head(material).split == "validation"


def test_models_that_are_equal_on_validation_are_named(run: Run) -> None:
    content = json.loads(run.metrics_path.read_text(encoding="utf-8"))
    for parts in content["models"].values():
        parts["validation"]["auc"] = 1.0
    run.metrics_path.write_text(json.dumps(content), encoding="utf-8")
    first, *others = content["models"]
    name, why = _report_head.chosen(read(run))
    assert name == first
    assert why.startswith("Chosen for the highest AUC on validation images (1.000, which ")
    assert all(other in why for other in others)


def test_the_area_under_the_precision_recall_curve_is_the_average_precision(run: Run) -> None:
    material = read(run)
    for model in material.models:
        scores = material.scores(model, "test")
        assert scores is not None
        recall, precision = _report_measures.precision_recall(scores)
        steps = recall - [0, *recall[:-1]]
        assert float(steps @ precision) == pytest.approx(material.of(model, "test")["average_precision"], abs=1e-12)


def test_the_scores_in_the_page_are_those_of_the_tables_bit_for_bit(run: Run) -> None:
    page = page_of(run)
    (text,) = (found for found in page.texts["script"] if found.startswith("{"))
    models = json.loads(text)["models"]
    material = read(run)
    assert list(models) == list(material.models)
    for model, found in models.items():
        assert found["threshold"] == material.point(model, "validation")["threshold"]
        for split, scored in found["splits"].items():
            scores = material.scores(model, split)
            assert scores is not None
            assert base64.b64decode(scored["scores"]) == scores.scores.astype("<f8").tobytes()
            assert base64.b64decode(scored["labels"]) == scores.labels.astype("u1").tobytes()


def test_too_many_scores_leave_the_slider_out_and_say_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_report_measures, "MAX_SLIDER_SCORES", 10)
    assert "There is no threshold slider: this run has more than 10 scores." in page_of(run).said


# --- nothing runs, nothing leaves ------------------------------------------------------------------------------------


NAMES = {"tl", "border-only", "virus", "bacteria", "IM", "NORMAL", "series", "python", "train"}  # keys that are names
STRUCTURE = {"false_negative", "false_positive", "true_positive", "validation", "test", "better", "worse"}


def poisoned(value: Any) -> Any:
    """Put a hostile name in the place of every text, and behind every key that is a name."""
    if isinstance(value, dict):
        return {f"{key}{HOSTILE}" if key in NAMES else key: poisoned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part) for part in value]
    return HOSTILE if isinstance(value, str) and value not in STRUCTURE else value


def poison(run: Run) -> None:
    """Make every name in a run hostile, in all its files."""
    paths = [run.metrics_path, run.audit_path, run.gallery_path, run.manifest_path, *run.folder.glob("stages/*.json")]
    for path in paths:
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    rows = run.catalog_path.read_text().replace("virus", '"vi<script>alert(1)</script>rus"')
    run.catalog_path.write_text(rows)


def test_no_name_becomes_markup(run: Run) -> None:
    poison(run)
    page = page_of(run)
    assert HOSTILE.split("<", 2)[1][:7] in page.said  # the names are shown, as text
    scripts = [found for tag, found in page.elements if tag == "script"]
    assert len(scripts) <= 2
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    sources = [found["src"] for _, found in page.elements if "src" in found]
    assert all(source.startswith("data:image/") for source in sources)
    assert "\u202e" not in page.said


def test_a_hostile_model_name_cannot_leave_the_embedded_scores(run: Run) -> None:
    content = json.loads(run.metrics_path.read_text())
    content["models"]["</script><b>"] = content["models"].pop("tl")
    run.metrics_path.write_text(json.dumps(content))
    for path in run.folder.glob("tables/tl_*"):
        path.rename(path.with_name(path.name.replace("tl_", "</script><b>_".replace("/", "\u2044"))))
    page = page_of(run)
    assert ("b", {}) not in page.elements


def test_the_policy_allows_just_the_style_and_the_script_that_stand_in_the_page(run: Run) -> None:
    page = page_of(run)
    (policy,) = (
        found["content"] for tag, found in page.elements if found.get("http-equiv") == "Content-Security-Policy"
    )
    (style,), scripts = page.texts["style"], page.texts["script"]
    (script,) = (found for found in scripts if not found.startswith("{"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not [found for _, found in page.elements if "style" in found]  # the policy would drop it


def test_nothing_in_the_page_points_elsewhere(run: Run) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:|file:|//[a-z])[^\s\"'<]*", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)) == []
    assert "@import" not in text
    assert "url(" not in text


def test_colours_can_be_told_from_their_ground_in_light_and_in_dark() -> None:
    style = (Path(report.__file__).with_name("report_page") / "report.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media", 2)[:2]]
    for colours in themes:
        on_ground = [(name, ground) for ground in ("paper", "page") for name in ("ink", "muted", "accent", "good")]
        on_ground += [("grave", "grave-back"), ("mind", "mind-back"), ("mind", "paper"), ("grave", "paper")]
        drawn = [(f"c{at}", "paper") for at in range(5)]  # lines and marks: 3 is enough (WCAG 1.4.11)
        for pairs, wanted in ((on_ground, 4.5), (drawn, 3)):
            poor = {pair: found for pair in pairs if (found := contrast(*(colours[name] for name in pair))) < wanted}
            assert poor == {}


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, from 1 to 21 (WCAG 2.2)."""

    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


# --- pictures and size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("../a.jpg", None, "left out: not the name of a picture"),
        ("sub/a.jpg", None, "left out: not the name of a picture"),
        (7, None, "no picture"),
        ("gone.jpg", None, "the picture is missing"),
        ("page.jpg", b"<svg onload=alert(1)>", "left out: neither JPEG nor PNG"),
        ("large.jpg", b"\xff\xd8\xff" + bytes(500_000), "left out for its size (500.0 kB)"),
    ],
)
def test_a_picture_that_is_none_is_left_out_and_said(run: Run, name: Any, content: bytes | None, told: str) -> None:
    if content is not None:
        (run.folder / "gallery" / str(name)).write_bytes(content)
    gallery = json.loads(run.gallery_path.read_text())
    gallery["models"]["tl"]["cases"][0]["picture"] = name
    run.gallery_path.write_text(json.dumps(gallery))
    assert told in page_of(run).said


def test_a_link_out_of_the_gallery_is_not_followed(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(reported.jpeg(77))
    (run.folder / "gallery" / "a.jpg").unlink()
    (run.folder / "gallery" / "a.jpg").symlink_to(secret)
    text = write_report(run).read_text(encoding="utf-8")
    assert base64.b64encode(secret.read_bytes()).decode() not in text


def test_a_large_gallery_keeps_the_report_below_its_bound_and_says_what_is_left_out(run: Run) -> None:
    gallery = json.loads(run.gallery_path.read_text())
    cases = gallery["models"]["tl"]["cases"]
    for at in range(60):
        (run.folder / "gallery" / f"large{at}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(250_000))
        cases.append(cases[0] | {"picture": f"large{at}.jpg", "evidence": None})
    run.gallery_path.write_text(json.dumps(gallery))
    path = write_report(run)
    assert path.stat().st_size < MAX_BYTES
    assert re.search(r"\d+ pictures were left out to keep this file small", path.read_text(encoding="utf-8"))


def test_a_report_that_words_alone_make_too_large_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_BYTES", 20_000)
    with pytest.raises(RunError, match=r"would be larger than 20\.0 kB even without pictures"):
        write_report(run)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a\\b", "C:a", "a\nb", "a\0", "a*"])
def test_a_name_that_could_leave_its_folder_is_no_plain_name(name: str) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("a-b_1.jpg")


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a\nb", "a\\nb"), ("\u202eabc", "\\u202eabc"), ("\udcff", "\\udcff"), ("名\u3000前", "名\u3000前")],
)
def test_what_cannot_be_seen_in_a_name_is_written_out(given: str, shown: str) -> None:
    assert plain(given) == shown
    assert len(plain("x" * 10_000)) < 250


# --- several runs ----------------------------------------------------------------------------------------------------


def test_runs_on_the_same_test_images_are_compared_pair_by_pair(made: Run, tmp_path: Path) -> None:
    other = reported.make(tmp_path / "other", seed=5, overrides=["seed=43"])
    path = write_comparison([made, other], tmp_path / "both.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "All runs were measured on the same 60 test images." in page.said
    assert re.search(r"first \((tl|ft)\) (and other \((tl|ft)\) cannot be told apart|is (better|worse))", page.said)
    assert "has chosen on test" in page.said
    assert [row[0].text for row in _specs_of(made, other)] == ["seed"]
    assert RESEARCH_USE in page.said


def test_runs_on_different_test_images_are_not_ranked(made: Run, tmp_path: Path) -> None:
    other = reported.make(tmp_path / "other", test_seed=9)
    said = Page(write_comparison([made, other], tmp_path / "both.html").read_text(encoding="utf-8")).said
    assert "The test images differ: these runs cannot be ranked." in said
    assert "Of different test images: do not compare them." in said
    assert not re.search(r"is better than|is worse than|cannot be told apart", said)


def test_runs_of_one_name_are_told_apart_by_their_parents(made: Run, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(made.folder, tmp_path / parent / "run")
    found = _report_compare.Comparison.of([read(Run(tmp_path / parent / "run")) for parent in ("a", "b")])
    assert list(found.runs) == ["a/run", "b/run"]


def test_a_run_whose_scores_are_gone_is_shown_and_not_compared(made: Run, run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.folder / "tables")
    said = Page(write_comparison([made, run], tmp_path / "both.html").read_text(encoding="utf-8")).said
    assert "All runs were measured on the same 60 test images." in said
    assert "holds no usable table of test scores" in said


def test_too_few_runs_or_one_named_twice_are_refused(made: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1 different run is not enough to compare; give two or more\."):
        write_comparison([made], tmp_path / "x.html")
    with pytest.raises(UsageError, match="not enough to compare"):
        write_comparison([made, Run(made.folder / ".." / made.folder.name)], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def _specs_of(*runs: Run) -> Any:
    found = _report_compare.Comparison.of([read(run) for run in runs])
    (differ,) = (one for one in found.sections() if one.name == "specs")
    return differ.blocks[0].rows  # type: ignore[union-attr]
