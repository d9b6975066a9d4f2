"""Several runs side by side: what differs in their Specs, their figures, and which can be told apart.

Owns the rule that runs are compared in pairs only on equal test images, and that each run enters with the model that
its own validation images chose. The verdict is `comparison`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final, Self

import pandas as pd

from pneumoscope import _charts, comparison, ledger
from pneumoscope._report_blocks import (
    UNDEFINED,
    Block,
    Cell,
    Charts,
    Points,
    Section,
    Table,
    Text,
    count,
    figure_cell,
    interval_of,
    joined,
    plain,
    threshold,
)
from pneumoscope._report_head import FIGURES, INTERVALS, chosen, warnings
from pneumoscope._report_material import Material, Scores, at, number, title_of, words
from pneumoscope.predictions import Predictions
from pneumoscope.specs import INDIFFERENT

_RESAMPLES: Final = 1000
_MAX_PAIRED: Final = 8  # runs; with more, adjusting for all pairs decides nothing
_LEVEL: Final = 0.95
_ABSENT: Final = "not there"


@dataclass(frozen=True)
class Comparison:
    """Runs to be shown side by side.

    Attributes
    ----------
    runs : mapping of str to Material
        By a name that tells them apart.
    """

    runs: Mapping[str, Material]

    @classmethod
    def of(cls, materials: Sequence[Material]) -> Self:
        """Name the runs by their folders, with as many parents as tell them apart.

        Parameters
        ----------
        materials : sequence of Material
            Of runs in different folders.

        Returns
        -------
        Comparison
        """
        parts = [material.run.folder.resolve().parts for material in materials]
        depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
        return cls({plain("/".join(part[-depth:])): one for part, one in zip(parts, materials, strict=True)})

    @property
    def subtitle(self) -> str:
        """One line under the heading."""
        return f"{len(self.runs)} runs: {joined(self.runs)}"

    @property
    def same_test(self) -> bool:
        """Whether all runs were measured on the same test images."""
        sets = {test_set(one) for one in self.runs.values()}
        return len(sets) == 1 and "" not in sets

    def sections(self) -> list[Section]:
        """Return the sections of the page, in order."""
        return [self._verdict(), self._figures("test"), self._figures("validation"), self._specs(), self._runs()]

    def _verdict(self) -> Section:
        name, title = "verdict", "Which run is better?"
        if not self.same_test:
            return Section(name, title, [self._test_sets()], "The test images differ: these runs cannot be ranked.")
        said = f"All runs were measured on the same {count(self._n_test())} test images."
        if len(self.runs) > _MAX_PAIRED:
            return Section(name, title, [Text(said)], f"More than {_MAX_PAIRED} runs are not compared in pairs.")
        try:
            sentences = _in_pairs(self.runs)
        except _NotPaired as error:
            return Section(name, title, [Text(said)], str(error))
        told = (
            "Each run enters with the model that its own validation images chose. Whoever picks a run by these test "
            "figures has chosen on test: measure the pick on images that no run has seen."
        )
        return Section(name, title, [Text(said), Points(sentences), Text(told, "warning")])

    def _n_test(self) -> float | None:
        first = next(iter(self.runs.values()))
        return number(first.of(chosen(first)[0], "test").get("n"))

    def _test_sets(self) -> Table:
        rows = []
        for name, one in self.runs.items():
            whole = one.of(chosen(one)[0], "test")
            figures = [Cell(count(whole.get(key))) for key in ("n", "n_positive", "n_negative")]
            rows.append([Cell(name), Cell(test_set(one) or "not known"), *figures])
        return Table(["Run", "Test set", "Images", "PNEUMONIA", "NORMAL"], rows, "Test images by their content")

    def _figures(self, split: str) -> Section:
        rows, bars = [], []
        for index, (name, one) in enumerate(self.runs.items()):
            best = chosen(one)[0]
            for model in one.models:
                whole, point = one.of(model, split), one.point(model, split)
                cells = [figure_cell(whole if key == "auc" else point, key) for key, _ in FIGURES]
                shown = Cell(
                    name, f"{title_of(model)}{', chosen on validation' if model == best else ''}", model == best
                )
                rows.append([shown, Cell(threshold(point.get("threshold"))), *cells])
                ends = interval_of(whole, "auc") or (None, None)
                bars.append((f"{name}, {plain(model)}", number(whole.get("auc")), *ends, index))
        head = ["Run and model", "Threshold", *(title for _, title in FIGURES)]
        if split == "test" and not self.same_test:  # one scale for all would rank them after all
            table = Table(head, rows, notes=[INTERVALS, "Of different test images: do not compare them."])
            return Section(split, "Figures on test images", [table])
        own = [] if split == "test" else ["They choose a model within a run; each run may hold out other images."]
        chart = Charts([_charts.intervals(bars, title=f"AUC on {split}, 95 % intervals")])
        table = Table(head, rows, notes=[INTERVALS, *own])
        return Section(split, f"Figures on {split} images", [table, chart])

    def _specs(self) -> Section:
        name, title = "specs", "What differs in the Specs"
        lacking = [run for run, one in self.runs.items() if "spec" in one.missing]
        flat = {run: _flat(one.spec) for run, one in self.runs.items() if run not in lacking}
        keys = sorted({key for found in flat.values() for key in found})
        differ = [key for key in keys if len({found.get(key, _ABSENT) for found in flat.values()}) > 1]
        missing = f"The Spec of {joined(lacking)} cannot be read." if lacking else ""
        if not differ:
            return Section(name, title, [Text("Nothing: the Specs are equal.")] if flat else [], missing)
        rows = [
            [Cell(plain(key)), *(Cell(plain(found.get(key, _ABSENT))) for found in flat.values())] for key in differ
        ]
        return Section(name, title, [Table(["Key", *flat], rows)], missing)

    def _runs(self) -> Section:
        rows, blocks = [], list[Block]()
        for name, one in self.runs.items():
            facts = [one.manifest.get("status"), one.manifest.get("data"), words(one.manifest.get("data_hash"))[:16]]
            looks = at(one.metrics, "test_set", "looks")
            shown = [Cell(plain(value or UNDEFINED)) for value in (*facts, words(one.manifest.get("spec_hash"))[:16])]
            rows.append([Cell(name), *shown, Cell(count(looks))])
            told = [warned.sentence for warned in warnings(one) if warned.level != "fine"]
            blocks += [Text(f"Of {name}:"), Points(told)] if told else []
        head = ["Run", "Status", "Data", "Data hash", "Spec hash", "Test set scored"]
        return Section("runs", "The runs, and what stands against each", [Table(head, rows), *blocks])


def test_set(material: Material) -> str:
    """Name a run's test images by what they are; empty where that is not known.

    Parameters
    ----------
    material : Material
        Of a run.

    Returns
    -------
    str
        As in the ledger.
    """
    for model in material.models:
        if (scores := material.scores(model, "test")) is not None:
            return ledger.test_set_of(scores.image_ids)
    return words(at(material.metrics, "test_set", "test_set"))


class _NotPaired(Exception):
    """Runs that cannot be compared image by image; the message says why."""


def _in_pairs(runs: Mapping[str, Material]) -> list[str]:
    """Compare each run's chosen model with those of the others, image by image."""
    tables, thresholds = {}, {}
    for name, one in runs.items():
        model = chosen(one)[0]
        scores = one.scores(model, "test")
        if scores is None:
            raise _NotPaired(f"{name} holds no usable table of test scores of {plain(model)}, so nothing was compared.")
        tables[f"{name} ({plain(model)})"] = _by_content(scores)
        found = number(one.point(model, "test").get("threshold"))
        thresholds[f"{name} ({plain(model)})"] = 0.5 if found is None else found
    first = next(iter(tables.values()))
    if any(not first[["image_id", "label"]].equals(table[["image_id", "label"]]) for table in tables.values()):
        raise _NotPaired("The runs label or count the same test images differently, so nothing was compared.")
    groups = _groups(runs, first["image_id"].tolist())
    pairs = len(list(combinations(tables, 2)))
    compared = comparison.compare_all(
        {name: Predictions.of(table, table["score"].to_numpy()) for name, table in tables.items()},
        groups=groups,
        thresholds=thresholds,
        resamples=max(_RESAMPLES, math.ceil(2 * pairs / (1 - _LEVEL))),
        level=_LEVEL,
    )
    return [one.sentence for one in compared]


def _by_content(scores: Scores) -> pd.DataFrame:
    """Return scores in the order of the images' content: runs may know one image by different paths."""
    table = pd.DataFrame({"image_id": scores.image_ids, "label": scores.labels, "score": scores.scores})
    ordered = table.sort_values(["image_id", "label"], kind="stable", ignore_index=True)
    return ordered.assign(path=ordered["image_id"], split="test")


def _groups(runs: Mapping[str, Material], image_ids: Sequence[str]) -> list[str]:
    for one in runs.values():
        of = {row.get("image_id"): row.get("group") or "" for row in one.catalog}
        if all(image_id in of for image_id in image_ids):
            return [of[image_id] for image_id in image_ids]
    raise _NotPaired("No run's catalog tells the patients of the test images, so nothing was compared.")


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every key of a Spec with its value as text; what no figure depends on is left out."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= {} if prefix + key in INDIFFERENT else _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat
