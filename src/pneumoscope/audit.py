"""Findings about a Catalog and its packed images: leaks, duplicates, double labels, files that are not what they seem.

Owns what counts as suspicious, how grave it is, and what a person is told to do about it. It changes and deletes
nothing; how images look is measured in `appearance`. Knows nothing of networks, runs or screens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import appearance
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, SpecError
from pneumoscope.specs import ALLOWABLE, LABELS
from pneumoscope.store import ImageStore

FINDINGS: Final[Mapping[str, str]] = {
    "content-across-test": "images (equal pixels) in test and outside it",
    "group-across-test": "groups in test and outside it",
    "content-across-validation": "images (equal pixels) in two of train, validation and calibration",
    "group-across-validation": "groups in two of train, validation and calibration",
    "two-labels": "images (equal pixels) under both labels",
    "class-missing": "classes without an image, counted in each split",
    "unreadable": "files that cannot be used",
    "near-duplicate": "pairs of images that look alike",
    "unknown-names": "files whose name tells no patient",
    "constant": "files of one grey",
    "tiny": "files that were enlarged more than twofold",
    "rotated": "files that look turned",
    "inverted": "files that look like negatives",
    "multi-page": "files of several pages",
    "duplicate-content": "images that are there more than once, byte for byte",
    "duplicate-pixels": "images that are there in other bytes with the same pixels",
    "misnamed": "files of another format than their name says",
    "large-group": "groups of `LARGE_GROUP` files or more",
    "class-imbalance": "files of the larger class",
    "kaggle-facts": "files that are named as in the Kaggle set",
}
"""Name of each finding -> what its ``count`` counts, in the order in which findings of one severity stand."""

CONSTANT_CONTRAST: Final = 5.0
"""Grey levels (standard deviation); the flattest of 5,206 real images has 19.9."""

LARGE_GROUP: Final = 10
"""Files; 13 of 3,669 patients of the Kaggle set's train images have so many."""

IMBALANCE: Final = 2.0
"""How many times as many files the larger class has."""

MAX_EXAMPLES: Final = 50
"""Examples kept of a finding; of leaks and double labels all are kept."""

Severity = Literal["error", "warning", "note"]
_Sets = list[tuple[str, pd.DataFrame]]  # files that belong together, under a name

_SEVERITIES: Final = ("error", "warning", "note")
_KEPT_WHOLE: Final = tuple(name for name in FINDINGS if "-across-" in name or name == "two-labels")
_FORMATS: Final = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}

# Kermany et al. (2018) as Kaggle has it: files of (NORMAL, PNEUMONIA), the 16 of `val` counted to train; and (groups
# of byte-identical files, files in these), in the whole set and in its train part.
_KAGGLE_TRAIN: Final = (1349, 3883)
_KAGGLE_WITHOUT_VAL: Final = (1341, 3875)
_KAGGLE_TEST: Final = (234, 390)
_KAGGLE_COPIES: Final = (30, 62)
_KAGGLE_TRAIN_COPIES: Final = (24, 50)
_NOT_COMPARABLE: Final = "figures do not compare with published ones."
_KAGGLE_GROUPS: Final = (("IM/", "NORMAL2-IM/"), ("bacteria/", "virus/"))  # beginnings, of NORMAL and of PNEUMONIA


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know about the data.

    Attributes
    ----------
    name : str
        One of `FINDINGS`.
    severity : {"error", "warning", "note"}
        An error stops a run; one that was allowed by name is a warning.
    count : int
        Of what `FINDINGS` says, 1 or more.
    sentence : str
        What was found, how many, what to do.
    examples : tuple of (str or tuple of str)
        Paths; or tuples that belong together: the paths of one image, the two paths of a pair, a group's name and its
        paths; or, for ``large-group``, names of groups. All for leaks and double labels, else at most `MAX_EXAMPLES`.
    """

    name: str
    severity: Severity
    count: int
    sentence: str
    examples: tuple[str | tuple[str, ...], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes under their names, for ``audit.json``."""
        return {
            "name": self.name,
            "severity": self.severity,
            "count": self.count,
            "sentence": self.sentence,
            "examples": self.examples,
        }


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found.

    Attributes
    ----------
    findings : tuple of Finding
        Errors first, then warnings, then notes; each in the order of `FINDINGS`.
    measures : DataFrame
        One row per usable row of the Catalog, in its order; see `appearance.Looks.measures`.
    pairs : DataFrame
        The near-duplicates that are most alike; see `appearance.near_duplicates`.
    """

    findings: tuple[Finding, ...]
    measures: pd.DataFrame
    pairs: pd.DataFrame

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The errors: no run may start with one."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def exit_status(self) -> int:
        """1 where there is an error, else 0."""
        return int(bool(self.refusals))

    def require_passed(self) -> None:
        """Refuse data with an error.

        Raises
        ------
        DataError
            With the name and the sentence of each.
        """
        if self.refusals:
            found = " ".join(f"{finding.name}: {finding.sentence}" for finding in self.refusals)
            raise DataError(f"The audit refuses these data. {found}")

    def as_dict(self) -> dict[str, Any]:
        """Return the findings, the pairs, the range of each measure and the rules, for ``audit.json``."""
        numbers = self.measures.select_dtypes("number")
        return {
            "passed": not self.refusals,
            "n_images": len(self.measures),
            "findings": [finding.as_dict() for finding in self.findings],
            "pairs": self.pairs.to_dict("records"),
            "measures": {
                name: {"min": column.min(), "median": column.median(), "max": column.max()}
                for name, column in numbers.items()
            },
            "rules": {
                "hash_distance": appearance.HASH_DISTANCE,
                "detail_correlation": appearance.DETAIL_CORRELATION,
                "turn_margin": appearance.TURN_MARGIN,
                "turn_images": appearance.TURN_IMAGES,
                "constant_contrast": CONSTANT_CONTRAST,
                "large_group": LARGE_GROUP,
                "imbalance": IMBALANCE,
            },
        }


def audit(
    catalog: Catalog,
    store: ImageStore,
    *,
    allow: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Look for what makes figures wrong.

    Parameters
    ----------
    catalog : Catalog
        Before or after it was divided: what stands in two splits is judged as it stands.
    store : ImageStore
        Its images, packed; those that it rejected count as unreadable.
    allow : sequence of str
        Errors to let pass, of `ALLOWABLE`. Where ``group-across-validation`` is allowed, so is one image in two splits
        as long as its copies are all of one group: that groups are cut is what was allowed.
    progress : callable, optional
        Called with (images done, images in all).

    Returns
    -------
    Audit

    Raises
    ------
    SpecError
        Where `allow` names what cannot be allowed.
    DataError
        Where a file that was listed cannot be read any more, or has changed.
    StoreError
        Where an image of the Catalog is not in the store.
    """
    for name in allow:
        if name not in ALLOWABLE:
            raise SpecError(
                f"audit.allow names {name!r}, but only {', '.join(ALLOWABLE)} can be allowed: what reaches into test "
                "never is, and other findings stop no run; take it out."
            )
    catalog = catalog.quarantine(store.rejected)
    looks = appearance.look(catalog, store, progress=progress)
    pairs, n_pairs = appearance.near_duplicates(looks)
    found = [
        *_leaks(looks.rows, allow),
        *_labels(looks.rows, allow),
        *_classes(catalog),
        *_files(catalog, looks.rows),
        *_groups(looks.rows),
        *_duplicates(looks.rows),
        *_near(pairs, n_pairs),
        *_pictures(looks.rows, store.size_px),
    ]
    if facts := kaggle_facts(catalog):
        found.append(facts)
    order = list(FINDINGS)
    found.sort(key=lambda finding: (_SEVERITIES.index(finding.severity), order.index(finding.name)))
    return Audit(tuple(found), looks.measures, pairs)


# --- sentences -------------------------------------------------------------------------------------------------------


def _n(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _of_files(name: str, severity: Severity, rows: pd.DataFrame, sentence: str) -> Iterator[Finding]:
    """Yield a finding about single files, where there are any; `sentence` follows their number and a colon."""
    if len(rows):
        paths = tuple(rows["path"][:MAX_EXAMPLES])
        yield Finding(name, severity, len(rows), f"{_n(len(rows), 'file')}: {sentence}", paths)


def _sets(rows: pd.DataFrame, by: str, differing: str) -> _Sets:
    """Return the rows of each value of `by` that stand under several values of `differing`."""
    several = rows[rows.groupby(by)[differing].transform("nunique") > 1]
    return [(str(value), part) for value, part in several.groupby(by, sort=False)]


def _of_sets(name: str, severity: Severity, sets: _Sets, sentence: str) -> Iterator[Finding]:
    """Yield a finding about files that belong together, where there are any."""
    if sets:
        is_group = name.startswith("group-")
        examples = tuple((*([value] if is_group else []), *part["path"]) for value, part in sets)
        files = _n(sum(len(part) for _, part in sets), "file")
        text = f"{_n(len(sets), 'group' if is_group else 'image')} ({files}) {sentence}"
        yield Finding(name, severity, len(sets), text, examples if name in _KEPT_WHOLE else examples[:MAX_EXAMPLES])


# --- leaks and labels ------------------------------------------------------------------------------------------------


def _leaks(rows: pd.DataFrame, allow: Sequence[str]) -> Iterator[Finding]:
    sides = rows.assign(side=rows["split"] == "test")
    text = "in test and outside it: the test asks what was seen in training, which is never allowed; "
    for name, by, advice in (
        ("content-across-test", "content", "delete the copies on one side."),
        ("group-across-test", "group", "move each group whole to one side."),
    ):
        yield from _of_sets(name, "error", _sets(sides, by, "side"), text + advice)
    seen = rows[rows["split"] != "test"]
    contents, groups = _sets(seen, "content", "split"), _sets(seen, "group", "split")
    inside_groups = all(part["group"].nunique() == 1 for _, part in contents)
    follows = inside_groups and "group-across-validation" in allow
    text = "in two of train, validation and calibration: figures on validation flatter; "
    for name, sets, allowed in (
        ("content-across-validation", contents, follows or "content-across-validation" in allow),
        ("group-across-validation", groups, "group-across-validation" in allow),
    ):
        mend = "split by group, or move each group whole to one side"
        if sets is contents and not inside_groups:
            mend = "delete all copies but one"
        advice = "allowed by name." if allowed else f"{mend}, or allow it with --allow {name}."
        yield from _of_sets(name, "warning" if allowed else "error", sets, text + advice)


def _labels(rows: pd.DataFrame, allow: Sequence[str]) -> Iterator[Finding]:
    allowed = "two-labels" in allow
    advice = "allowed by name." if allowed else "find out which, and delete its files, or all."
    text = f"under both labels, of which one is wrong: {advice}"
    yield from _of_sets("two-labels", "warning" if allowed else "error", _sets(rows, "content", "label"), text)


def _classes(catalog: Catalog) -> Iterator[Finding]:
    counts = catalog.counts()
    if counts.empty:
        text = "No image can be used, so nothing can be learned or measured; JPEG, PNG and DICOM images are expected."
        yield Finding("class-missing", "error", len(LABELS), text)
        return
    missing = [(str(split), label) for split in counts.index for label in LABELS if not counts.at[split, label]]
    if missing:
        only_test = all(split == "test" for split, _ in missing)
        where = " and ".join(f"no {label} image in {split}" for split, label in missing)
        why = "what compares the classes there stays undefined" if only_test else "no model can be trained so"
        text = f"There is {where}: {why}; add images, or check the names of the folders."
        yield Finding("class-missing", "warning" if only_test else "error", len(missing), text)
    total = counts.sum()
    smaller, larger = sorted(LABELS, key=lambda label: int(total[label]))
    if total[smaller] and total[larger] >= IMBALANCE * total[smaller]:
        shares = ", ".join(f"{share:.0%} of {split}" for split, share in (counts[larger] / counts["total"]).items())
        text = (
            f"{larger} has {total[larger] / total[smaller]:.1f} times as many files as {smaller} ({shares}): to call "
            f"everything {larger} is right that often, so read sensitivity and specificity beside accuracy."
        )
        yield Finding("class-imbalance", "note", int(total[larger]), text)


# --- files and groups ------------------------------------------------------------------------------------------------


def _files(catalog: Catalog, rows: pd.DataFrame) -> Iterator[Finding]:
    bad = catalog.quarantined()
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in bad["status"].value_counts().items())
    text = f"left out because they cannot be used ({reasons}); get them again, or delete them."
    yield from _of_files("unreadable", "warning", bad, text)
    named = rows["path"].map(lambda path: _FORMATS.get(Path(path).suffix.lower(), ""))
    misnamed = rows[(named != "") & (named != rows["format"])]
    text = "another format than the name says; read by their content, so there is nothing to do."
    yield from _of_files("misnamed", "note", misnamed, text)
    text = "several pages, of which only the first was read; look whether it is the right one."
    yield from _of_files("multi-page", "warning", rows[rows["frames"] > 1], text)


def _groups(rows: pd.DataFrame) -> Iterator[Finding]:
    unknown = rows[rows["group"].str.startswith("file/")]
    text = (
        f"names (of {len(rows):,}) that tell no patient, so each is a group of its own, and one patient may stand in "
        "two splits; name the patients in the column group of a manifest."
    )
    yield from _of_files("unknown-names", "warning", unknown, text)
    sizes = rows["group"].value_counts()
    large = sizes[sizes >= LARGE_GROUP]
    if len(large):
        text = (
            f"{_n(len(large), 'group')} of {LARGE_GROUP} files or more, the largest {large.index[0]} with "
            f"{large.iloc[0]:,}: files of one patient are alike, so take intervals made by group."
        )
        yield Finding("large-group", "note", len(large), text, tuple(map(str, large.index[:MAX_EXAMPLES])))


def _duplicates(rows: pd.DataFrame) -> Iterator[Finding]:
    advice = "each copy counts; delete all but one to count them once."
    text = f"more than once, byte for byte: {advice}"
    yield from _of_sets("duplicate-content", "note", _sets(rows, "image_id", "path"), text)
    text = f"more than once, in other bytes but with the same pixels: {advice}"
    yield from _of_sets("duplicate-pixels", "note", _sets(rows, "content", "image_id"), text)


def _near(pairs: pd.DataFrame, count: int) -> Iterator[Finding]:
    if not count:
        return
    groups, splits = int((~pairs["same_group"]).sum()), int((~pairs["same_split"]).sum())
    listed = "" if count == len(pairs) else f"of the {len(pairs):,} most alike "
    text = (
        f"{_n(count, 'pair')} of images that look alike, {listed}{groups:,} in different groups and {splits:,} in "
        "different splits: candidates only, nothing was left out; look at them side by side, and delete copies."
    )
    examples = tuple(zip(pairs["first"][:MAX_EXAMPLES], pairs["second"][:MAX_EXAMPLES], strict=True))
    yield Finding("near-duplicate", "warning" if splits else "note", count, text, examples)


# --- pictures --------------------------------------------------------------------------------------------------------


def _pictures(rows: pd.DataFrame, size_px: int) -> Iterator[Finding]:
    shorter = rows[["width_px", "height_px"]].min(axis=1)
    stands = rows["orientation"]
    for name, hit, text in (
        ("constant", rows["contrast"] < CONSTANT_CONTRAST, "one grey all over; they show nothing, so delete them."),
        (
            "tiny",
            2 * shorter < size_px,
            f"less than half of {size_px} px high or wide, hence enlarged; get larger ones, or lower image.size_px.",
        ),
        ("rotated", stands.str.contains("turned"), "turned, it seems; look at them, and turn them upright."),
        ("inverted", stands.str.startswith("inverted"), "negatives, it seems; look at them, and invert them."),
    ):
        yield from _of_files(name, "warning", rows[hit], text)


# --- the published set -----------------------------------------------------------------------------------------------


def kaggle_facts(catalog: Catalog) -> Finding | None:
    """Say whether these are the published images, as far as names, counts and copies tell, and what differs.

    Parameters
    ----------
    catalog : Catalog
        With the splits that came with the data, or divided.

    Returns
    -------
    Finding or None
        A note; None where not even half of the files are named as in the set that Kaggle has (Kermany et al. 2018).
    """
    table = catalog.table
    named = table[_has_kaggle_name(table)]
    if 2 * len(named) <= len(table):
        return None
    in_test = named["split"] == "test"
    test, rest = _per_label(named[in_test]), _per_label(named[~in_test])
    every = (test[0] + rest[0], test[1] + rest[1])
    anew = f"divided anew ({_n(int(in_test.sum()), 'file')} in test)"
    known: tuple[int, int] | None = _KAGGLE_COPIES
    if test == _KAGGLE_TEST and rest == _KAGGLE_TRAIN:
        text = (
            "By names and counts, the published 5,232 train images (with the 16 of its val folder) and 624 test images."
        )
    elif test == _KAGGLE_TEST and rest == _KAGGLE_WITHOUT_VAL:
        text = "By names and counts, the published 5,216 train and 624 test images, without the 16 of its val folder."
    elif every == _KAGGLE_TRAIN:
        known = _KAGGLE_TRAIN_COPIES
        text = (
            f"By names and counts, the published 5,232 train images, {anew}, without the 624 of test: {_NOT_COMPARABLE}"
        )
    elif every == (_KAGGLE_TRAIN[0] + _KAGGLE_TEST[0], _KAGGLE_TRAIN[1] + _KAGGLE_TEST[1]):
        text = f"By names and counts, the published 5,856 images, {anew}: {_NOT_COMPARABLE}"
    else:
        known = None
        text = (
            f"The names are those of the Kaggle set, but the {len(named):,} files (NORMAL {every[0]:,}, PNEUMONIA "
            f"{every[1]:,}) are not its 5,232 + 624: {_NOT_COMPARABLE}"
        )
    differences = _kaggle_differences(table, named, known)
    return Finding("kaggle-facts", "note", len(named), " ".join([text, *differences]))


def _has_kaggle_name(table: pd.DataFrame) -> npt.NDArray[np.bool_]:
    of_label = [
        ((table["label"] == label) & table["group"].str.startswith(prefixes)).to_numpy(dtype=np.bool_)
        for label, prefixes in enumerate(_KAGGLE_GROUPS)
    ]
    return np.logical_or(*of_label)


def _per_label(table: pd.DataFrame) -> tuple[int, int]:
    return int((table["label"] == 0).sum()), int((table["label"] == 1).sum())


def _kaggle_differences(table: pd.DataFrame, named: pd.DataFrame, known: tuple[int, int] | None) -> Iterator[str]:
    usable = named[named["status"] == "ok"]
    if known is not None:
        copies = usable["image_id"].value_counts()
        found = (int((copies > 1).sum()), int(copies[copies > 1].sum()))
        said = f"{found[0]} groups of byte-identical files ({found[1]} files)"
        yield f"Its {said} are there." if found == known else f"It has {said} where {known[0]} ({known[1]}) are known."
    sizes = usable[["width_px", "height_px"]].drop_duplicates()
    if len(usable) > 1 and len(sizes) == 1:
        width, height = sizes.iloc[0]
        yield f"All are {width} x {height} px, the published ones differ in size: these are made from them."
    if others := len(table) - len(named):
        yield f"{_n(others, 'other file')} besides."
