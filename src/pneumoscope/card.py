"""The model card: what a model is for, what it was made of, how it was measured, and what only a person can say.

Owns what is gathered for the card from a run (`facts_of`), how it becomes Markdown (``model_card.md.jinja``), and that
no name of a folder or a file can become Markdown or HTML. Computes no figure: all come from ``metrics.json``. Loads no
Keras, because bundles are written and recalibrated without it.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pneumoscope import _files
from pneumoscope.errors import RunError
from pneumoscope.runs import Run
from pneumoscope.specs import INDIFFERENT, LABELS, PRESETS, PRETRAINED, RESEARCH_USE, TITLES, Spec

TODO: Final = "TODO (a person must say)"
"""Stands where no run can know the answer."""

NONE: Final = "–"
"""Stands for a figure that is undefined."""

SPLITS: Final = ("train", "validation", "calibration", "test")
"""In the order in which they stand."""

KERMANY: Final = (
    "D. Kermany, K. Zhang, M. Goldbaum, Labeled Optical Coherence Tomography (OCT) and Chest X-Ray Images for "
    "Classification, Mendeley Data, doi 10.17632/rscbjbr9sj, CC BY 4.0; Kermany et al., Cell 172 (2018) 1122-1131"
)
"""The attribution that the licence of the published set asks for."""

_NAME: Final = "model_card.md"
_UNSAID: Final = (*INDIFFERENT, "data")  # parts of the Spec that no figure hangs on, or that name a site's own folders
_STAMP: Final = re.compile(r"\n\[//\]: # \(written by pneumoscope; ([0-9a-f]{64})\)\n\Z")
_SPECIAL: Final = re.compile(r"[\\`*_\[\]|~$#]")
_FIGURES: Final = ("sensitivity", "specificity", "positive_predictive_value", "negative_predictive_value")
_COUNTS: Final = ("false_negatives", "false_positives", "true_negatives", "true_positives")
_CALIBRATION: Final = ("temperature", "slope", "intercept", "expected_calibration_error", "brier")


# --- text that stays text --------------------------------------------------------------------------------------------


def escaped(value: object) -> str:
    """Return a value as one line of Markdown that shows it and does nothing else.

    Tags, emphasis, links (bare addresses too), code, table bars and line ends lose their meaning; characters that
    cannot be seen, such as those that turn the direction of writing, become spaces.

    Parameters
    ----------
    value : object
        Of any kind; None becomes a dash.
    """
    if value is None:
        return NONE
    text = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(char, entity)
    text = _SPECIAL.sub(lambda found: "\\" + found[0], text)
    return re.sub(r"(?i)(www)\.", r"\1\\.", text.replace("://", ":\\//"))


def figure(value: float | None, interval: Mapping[str, Any] | None = None, *, digits: int = 3) -> str:
    """Return a figure with its interval, for example ``0.914 (0.881–0.938)``.

    Parameters
    ----------
    value : float or None
        None is undefined.
    interval : mapping, optional
        With ``low`` and ``high``.
    digits : int
        Behind the point.

    Returns
    -------
    str
    """
    if value is None:
        return NONE
    ends = "" if interval is None else f" ({interval['low']:.{digits}f}–{interval['high']:.{digits}f})"
    return f"{value:.{digits}f}{ends}"


# --- facts -----------------------------------------------------------------------------------------------------------


def facts_of(run: Run, *, models: Collection[str] | None = None, shared: bool = False) -> dict[str, Any]:
    """Gather what a card says of a run's models.

    Parameters
    ----------
    run : Run
        Its models measured.
    models : collection of str, optional
        Which; all that were measured where not given.
    shared : bool
        Leave out what could name a patient or a place, for a card that leaves with a bundle.

    Returns
    -------
    dict
        Plain values, ready for JSON and for `text`.

    Raises
    ------
    StoreError
        Where a file of the run is missing or damaged.
    SpecError
        Where its Spec is.
    """
    measured, manifest, stages = _files.read_json(run.metrics_path), run.read_manifest(), run.read_stages()
    spec = run.read_spec()
    chosen = [name for name in measured["models"] if models is None or name in models]
    content = spec.model_dump(mode="json", exclude=set(_UNSAID))
    return dict(
        _files.jsonable(
            {
                "note": str(manifest.get("note", "")),
                "started": manifest.get("started"),
                "data": _data(run, manifest),
                "spec": content,
                "spec_sha256": spec.hash,
                "machine": manifest.get("machine"),
                "software": {"pneumoscope": _version(), **(manifest.get("machine") or {}).get("versions", {})},
                "chosen_on": measured["chosen_on"],
                "models": {
                    name: {
                        "title": TITLES.get(name, name),
                        "training": _training(stages.get(f"train-{name}", {})),
                        "metrics": {
                            split: _measured(found, shared=shared) for split, found in measured["models"][name].items()
                        },
                        "worst": _worst(run, name, "test" if "test" in measured["models"][name] else "validation"),
                        "moved": _sentence((measured.get("moved") or {}).get(name)),
                    }
                    for name in chosen
                },
                "shortcuts": {
                    name: {split: {key: found[key] for key in ("auc", "auc_interval")} for split, found in of.items()}
                    for name, of in measured.get("shortcuts", {}).items()
                },
                "verdicts": [
                    one["sentence"]
                    for one in measured.get("comparisons", {}).get("test", [])
                    if {one["first"], one["second"]} & set(chosen)
                ],
                "shift": _shift(measured.get("shift") or {}, shared=shared),
                "not_assessable": _sentence(measured.get("not_assessable")),
                "test_set": _sentence(measured.get("test_set")),
                "repeats": _repeats(run),
                "elsewhere": len(list((run.folder / "evaluations").glob("*/metrics.json"))),
            }
        )
    )


def _data(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
    rows = _files.read_csv(run.catalog_path)
    usable = [row for row in rows if row["status"] == "ok"]
    images: Counter[tuple[str, str, str]] = Counter()
    groups: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in usable:
        part = row["split"], LABELS[int(row["label"])], row["subtype"]
        images[part] += 1
        groups[part].add(row["group"])
    order = sorted(images, key=lambda part: (*(SPLITS.index(part[0]),), *part[1:]))
    findings = _files.read_json(run.audit_path)["findings"] if run.audit_path.exists() else []
    published = next((str(one["sentence"]) for one in findings if one["name"] == "kaggle-facts"), "")
    return {
        "name": Path(str(manifest["data"])).name,
        "sha256": manifest["data_hash"],
        "kind": _kind(str(manifest.get("note", "")), published, [row["path"] for row in usable[:1]]),
        "published": published,
        "counts": [
            {"split": part[0], "label": part[1], "subtype": part[2] or None, "images": images[part],
             "groups": len(groups[part])}
            for part in order
        ],
        "left_out": len(rows) - len(usable),
        "findings": [{key: one[key] for key in ("name", "severity", "count")} for one in findings],
    }  # fmt: skip


def _kind(note: str, published: str, paths: Sequence[str]) -> str:
    """Return whose images these are, as far as their names and marks tell."""
    if "SYNTHETIC DATA" in note:  # drawn under the published set's names, so asked first
        return "synthetic"
    if published.startswith("By names and counts"):  # a site may name its files so as well
        return "kermany"
    return "pneumoniamnist" if any("pneumoniamnist" in path.lower() for path in paths) else "unknown"


def _training(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("parameters", "epoch", "epochs", "best_epoch", "stopped_early", "diverged", "seconds", "parts", "speed")
    return {key: record.get(key) for key in (*kept, "machine")}


def _measured(found: Mapping[str, Any], *, shared: bool) -> dict[str, Any]:
    point = found.get("operating_point")
    name = "" if point is None else point["name"]
    divisions = {
        division: {value: _part(part, name) for value, part in parts.items()}
        for division, parts in (found.get("subgroups") or {}).items()
        if not (shared and division == "series")  # beginnings of groups' names, which a site may have made of names
    }
    kept = {key: found.get(key) for key in ("n", "n_positive", "n_negative", "auc", "auc_interval", "calibration")}
    reasons = {key: why for key, why in (found.get("undefined") or {}).items() if key.startswith((f"{name}.", "auc"))}
    groups = {"auc": (found.get("group_intervals") or {}).get("auc")}
    return {**kept, "group_intervals": groups, "operating_point": point, "subgroups": divisions, "undefined": reasons}


def _part(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    point = part["operating_points"].get(name)
    return {
        **{key: part[key] for key in ("n", "auc", "auc_interval")},
        "operating_point": point and {key: point[key] for key in (*_FIGURES[:2], *_COUNTS, "intervals")},
    }


def _worst(run: Run, model: str, split: str) -> dict[str, Any] | None:
    """Return the scores that are farthest off: the lowest of a PNEUMONIA image, the highest of a NORMAL one."""
    path = run.table_path(model, f"{split}_yscores")
    rows = _files.read_csv(path) if path.exists() else []
    of = {label: [float(row["y_scores"]) for row in rows if row["y_true"] == label] for label in "01"}
    return {"split": split, "lowest": min(of["1"], default=None), "highest": max(of["0"], default=None)}


def _sentence(found: Mapping[str, Any] | None) -> str | None:
    return None if found is None else found.get("sentence")


def _shift(found: Mapping[str, Any], *, shared: bool) -> list[str]:
    reason = found.get("reason")
    if isinstance(reason, str):  # it may name places on this machine
        return ["Training and test images were not compared." if shared else reason]
    return [str(one["sentence"]) for one in found.values() if isinstance(one, Mapping)]


def _repeats(run: Run) -> list[str]:
    parts = _files.read_json(run.repeats_path) if run.repeats_path.exists() else {}
    return [sentence for key in ("folds", "seeds") for sentence in parts.get(key, {}).get("sentences", [])]


def _version() -> str:
    from importlib.metadata import version

    return version("pneumoscope")


# --- Markdown --------------------------------------------------------------------------------------------------------


def text(facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown.

    Parameters
    ----------
    facts : mapping
        From `facts_of`; what is missing is said to be so.

    Returns
    -------
    str
        CommonMark with tables as GitHub has them; no HTML.
    """
    data = facts.get("data") or {}
    findings = data.get("findings")
    filled = {
        **{key: facts.get(key) for key in _KEYS},
        "data": data,
        "crossing": findings and [one["name"] for one in findings if "-across-" in one["name"]],
        "alike": findings and sum(one["count"] for one in findings if one["name"] == "near-duplicate"),
        "settings": _settings(facts.get("spec") or {}),
        "command": _command(data.get("name"), facts.get("spec") or {}),
        "tables": {name: _tables(of) for name, of in (facts.get("models") or {}).items()},
        "todo": TODO,
        "research_use": RESEARCH_USE,
        "labels": LABELS,
        "kermany": KERMANY,
        "pretrained": PRETRAINED,
    }
    return str(_template().render(filled))


_KEYS: Final = (
    "note", "spec", "spec_sha256", "machine", "software", "chosen_on", "models", "shortcuts", "verdicts", "shift",
    "not_assessable", "test_set", "repeats", "elsewhere", "bundle", "started",
)  # fmt: skip


@functools.cache
def _template() -> Any:
    import jinja2  # late: a look at bundle.json does not need it

    def known(value: Any) -> Any:
        return None if isinstance(value, jinja2.Undefined) else value

    folder = Path(__file__).with_name("report_page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        finalize=lambda value: escaped(known(value)),  # every value, whatever it is; autoescape knows HTML only
        autoescape=False,
        undefined=jinja2.ChainableUndefined,  # an older run or bundle knows less: that is a dash
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["figure"] = lambda value, *given, **named: figure(known(value), *given, **named)
    environment.filters["size"] = _files.size_text
    return environment.get_template(f"{_NAME}.jinja")


def _settings(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every key of the Spec with its value, ``train.epochs`` and so on."""
    return [
        (key, ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value))
        for key, value in _values(spec)
    ]


def _values(spec: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in spec.items():
        if key in _UNSAID:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _command(data: str | None, spec: Mapping[str, Any]) -> str | None:
    """Return the command that makes such a run: the preset, and what was set besides."""
    if data is None or spec.get("preset") not in PRESETS:
        return None
    usual = dict(_values(Spec.preset_named(spec["preset"]).model_dump(mode="json")))
    words = ["pneumoscope", "run", data, "-o", "RUN", "--preset", str(spec["preset"])]
    for key, value in _values(spec):
        if key in usual and usual[key] != value:
            words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def _tables(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of one model's tables, cells already text."""
    measured: Mapping[str, Any] = model["metrics"]
    rows: list[list[Any]] = []
    reasons: dict[str, None] = {}
    calibration: list[list[str]] = []
    parts: list[list[Any]] = []
    for split, found in measured.items():
        point = found.get("operating_point") or {}
        threshold = figure(point.get("threshold"), digits=4)
        rows.append([split, _n(found), threshold, _auc(found), *(_with_interval(point, key) for key in _FIGURES),
                     *(point.get(key) for key in _COUNTS[:2])])  # fmt: skip
        reasons |= dict.fromkeys((found.get("undefined") or {}).values())
        of = found.get("calibration") or {}
        calibration.append([split, *(figure(of.get(key)) for key in _CALIBRATION)])
        if of.get("temperature"):
            raw = {**(found.get("calibration_raw") or {}), "temperature": None}
            calibration.append([f"{split}, score itself", *(figure(raw.get(key)) for key in _CALIBRATION)])
        for division, values in (found.get("subgroups") or {}).items():
            parts += [[split, division, *_part_row(value, part)] for value, part in values.items() if split == "test"]
    return {
        "point": next((found["operating_point"] for found in measured.values() if found.get("operating_point")), None),
        "figures": rows,
        "undefined": list(reasons),
        "calibration": calibration,
        "subgroups": parts,
    }


def _n(found: Mapping[str, Any]) -> str:
    counts = [found.get(key) for key in ("n", "n_positive", "n_negative")]
    return NONE if None in counts else "{:,} ({:,} / {:,})".format(*counts)


def _auc(found: Mapping[str, Any]) -> str:
    return _marked(found.get("auc"), (found.get("group_intervals") or {}).get("auc"), found.get("auc_interval"))


def _with_interval(point: Mapping[str, Any], key: str) -> str:
    by_group, by_image = ((point.get(name) or {}).get(key) for name in ("group_intervals", "intervals"))
    return _marked(point.get(key), by_group, by_image)


def _marked(value: float | None, by_group: Mapping[str, Any] | None, by_image: Mapping[str, Any] | None) -> str:
    """Return a figure with the interval over groups, or where there is none with that over images, marked."""
    if value is None or by_group is not None:
        return figure(value, by_group)
    return figure(value, by_image) + ("" if by_image is None else " i")


def _part_row(value: str, part: Mapping[str, Any]) -> list[Any]:
    point = part.get("operating_point") or {}
    shares = [figure(point.get(key), (point.get("intervals") or {}).get(key)) for key in _FIGURES[:2]]
    return [value, part["n"], figure(part["auc"], part["auc_interval"]), *shares, *(point.get(k) for k in _COUNTS[:2])]


# --- where cards lie -------------------------------------------------------------------------------------------------


def write_card(run: Run) -> Path:
    """Write the card of a run's models, ``model_card.md``.

    Parameters
    ----------
    run : Run
        Its models measured.

    Returns
    -------
    Path
        See `put`.

    Raises
    ------
    PneumoscopeError
        Where a file of the run cannot be read or the card cannot be written.
    """
    if not run.metrics_path.exists():
        raise RunError(f"The run in {run.folder} is {run.status} and measured no model yet; run it to its end first.")
    return put(run.card_path, text(facts_of(run)))


def text_of_bundle(content: Mapping[str, Any]) -> str:
    """Return the card of a bundle's model.

    Parameters
    ----------
    content : mapping
        As in ``bundle.json``; what an older one lacks is said to be missing.

    Returns
    -------
    str
        Markdown.
    """
    facts, provenance, name = dict(content.get("card") or {}), content["provenance"], str(content["model"])
    model = {"title": content["title"], "training": {}, "worst": None, "moved": None, "metrics": {}}
    model |= (facts.get("models") or {}).get(name, {})
    again = bool(provenance.get("recalibrated")) or content.get("weights") == "int8"
    before = model["metrics"]
    model["metrics"] = {
        split: {**_measured(found, shared=True), "subgroups": {} if again else before.get(split, {}).get("subgroups")}
        for split, found in content["metrics"].items()
    }
    if again:  # they were made with thresholds that are no longer in force
        model |= {"moved": None}
    of_bundle = {
        "weights": content.get("weights"),
        "parity": content.get("parity") or {},
        "not_assessable": content.get("not_assessable") or {},
        "points": content["operating_points"],
        "recalibrated": provenance.get("recalibrated") or [],
        "exported": provenance.get("exported"),
        "model_sha256": provenance.get("model_sha256"),
    }
    known = {key: provenance.get(key) for key in ("spec", "spec_sha256", "machine")}
    known["data"] = {"name": provenance.get("data"), "sha256": provenance.get("data_sha256"), "kind": "unknown"}
    return text(
        {**known, **facts, "note": content["note"], "chosen_on": content["chosen_on"], "models": {name: model},
         "bundle": of_bundle}
    )  # fmt: skip


def put(path: Path, card: str) -> Path:
    """Write a card, but never over one that a person has gone on with: the new one then lies beside it.

    Parameters
    ----------
    path : Path
        Of the card.
    card : str
        Markdown.

    Returns
    -------
    Path
        Where it was written: `path`, or its neighbour ``model_card.new.md``.

    Raises
    ------
    PneumoscopeError
        Where it cannot be written.
    """
    if path.exists() and not _is_ours(path.read_text(encoding="utf-8", errors="replace")):
        path = path.with_name(f"{path.stem}.new{path.suffix}")
    _files.write_text(path, f"{card}\n[//]: # (written by pneumoscope; {_files.sha256_of(card.encode())})\n")
    return path


def _is_ours(written: str) -> bool:
    """Return whether a card stands as it was written; its last line, which no reader shows, is the hash of the rest."""
    found = _STAMP.search(written)
    return found is not None and _files.sha256_of(written[: found.start()].encode()) == found[1]
