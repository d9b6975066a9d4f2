"""A site's own labelled images, scored by a bundle's network: what recalibration stands on.

Owns which of the images count (each content once, decodable, under one label) and that their names and patients go no
further than their groups. Loads no Keras. Knows nothing of operating points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import _files
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, ImageError
from pneumoscope.narration import Narration
from pneumoscope.predictions import Predictions
from pneumoscope.predictor import Picture, Predictor
from pneumoscope.specs import LABELS

SITE: Final = "site"
"""What the new bundle calls the images that its choices come from."""

LEAST_IMAGES: Final = 10
"""Images of each label below which nothing is chosen: one image would move a share by more than a tenth."""

_BATCH: Final = 32  # images in memory at a time


@dataclass(frozen=True)
class Sample:
    """The site's images, scored by the network of the bundle.

    Attributes
    ----------
    predictions : Predictions
        One row per distinct image that can be used.
    groups : ndarray of str, shape (n,)
        The patient of each row, as far as the data tell.
    left_out : mapping of str to int
        Why images were left out, and how many.
    unlike : int or None
        Rows that are not assessable by the reference of the old bundle; None where it has none.
    sha256 : str
        Of the contents and labels of the rows, whatever the files are called.
    """

    predictions: Predictions
    groups: npt.NDArray[np.str_]
    left_out: Mapping[str, int]
    unlike: int | None
    sha256: str

    @property
    def counts(self) -> tuple[int, int]:
        """Images of NORMAL and of PNEUMONIA."""
        sick = int(self.predictions.labels.sum())
        return len(self.predictions) - sick, sick

    @property
    def n_groups(self) -> int:
        """Distinct groups."""
        return len(np.unique(self.groups))

    def n_groups_of(self, label: int) -> int:
        """Count the distinct groups that have an image of a label, 0 or 1."""
        return len(np.unique(self.groups[self.predictions.labels == label]))


def score(predictor: Predictor, catalog: Catalog, *, narration: Narration | None = None) -> Sample:
    """Score a site's images, each content once; bad files are left out and counted.

    Parameters
    ----------
    predictor : Predictor
        Of the bundle.
    catalog : Catalog
        The images; `_BATCH` of them are in memory at a time.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Sample
        Without an image that cannot be decoded or shows nothing, without further copies of an image, and without one
        that stands under both labels.
    """
    voice = narration or Narration("silent")
    left_out: dict[str, int] = {}
    for status in catalog.quarantined()["status"]:
        _count(left_out, str(status))
    rows = catalog.rows()
    both = rows.groupby("image_id")["label"].transform("nunique") > 1
    copies = rows["image_id"].duplicated() & ~both
    _count(left_out, "under both labels", int(both.sum()))
    _count(left_out, "a copy of another image", int(copies.sum()))
    rows = rows[~both & ~copies].reset_index(drop=True)
    kept, scores, like = [], [], []
    familiarity = predictor.description.familiarity
    with voice.stage("Scoring the site's images with onnxruntime"), voice.bar("images") as progress:
        for at, pictures in _read(predictor, catalog, rows, left_out):
            if pictures:
                outputs = predictor.network(np.stack([picture.pixels for _, picture in pictures]))
                kept += [row for row, _ in pictures]
                scores.append(outputs.score)
                if familiarity is not None:
                    like.append(familiarity.assess(outputs.features)[1])
            progress(at, len(rows))
    used = rows.iloc[kept].assign(split=SITE)
    contents = sorted(zip(used["image_id"], used["label"].astype(int), strict=True))
    return Sample(
        predictions=Predictions.of(used, np.concatenate([np.empty(0, np.float32), *scores])),
        groups=used["group"].to_numpy(dtype=str),
        left_out=left_out,
        unlike=None if familiarity is None else sum(int((~each).sum()) for each in like),
        sha256=_files.hash_of({"images": contents}),
    )


def _read(
    predictor: Predictor, catalog: Catalog, rows: pd.DataFrame, left_out: dict[str, int]
) -> Iterator[tuple[int, list[tuple[int, Picture]]]]:
    """Yield, batch by batch, how many files were read and the row number and picture of each good one."""

    def read(path: str) -> Picture | str:
        try:
            picture = predictor.read(catalog.read_bytes(path))
        except ImageError as error:
            return error.reason
        return "shows nothing" if picture.empty else picture

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), _BATCH):
            found = list(pool.map(read, rows["path"].iloc[start : start + _BATCH]))
            for reason in (each for each in found if isinstance(each, str)):
                _count(left_out, reason)
            good = [(start + at, each) for at, each in enumerate(found) if isinstance(each, Picture)]
            yield start + len(found), good


def _count(into: dict[str, int], reason: str, n: int = 1) -> None:
    if n:
        into[reason] = into.get(reason, 0) + n


def require_enough(sample: Sample) -> None:
    """Refuse a sample that is too small to choose anything on.

    Parameters
    ----------
    sample : Sample
        From `score`.

    Raises
    ------
    DataError
        Where a label has fewer than `LEAST_IMAGES` images.
    """
    for name, n in zip(LABELS, sample.counts, strict=True):
        if n < LEAST_IMAGES:
            raise DataError(
                f"The site's images hold {n or 'no'} usable {name} image{'' if n == 1 else 's'} among "
                f"{len(sample.predictions):,}, but at least {LEAST_IMAGES} of each label are needed to choose an "
                "operating point; add labelled images, and have the data checked with pneumoscope audit."
            )
