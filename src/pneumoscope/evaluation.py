"""Evaluation of trained models: every image scored once, every figure, curve, table and verdict from those scores.

Owns what is measured, compared and written of a run's models, on its own images or on others. Trains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import _files, features, figures, gallery, inference, ledger, metrics, scorecard, shift, shortcut
from pneumoscope import card as model_card
from pneumoscope.catalog import Catalog
from pneumoscope.conformal import Share
from pneumoscope.errors import DataError, RunError, WeightsError
from pneumoscope.familiarity import Familiarity
from pneumoscope.ledger import Ledger, Look
from pneumoscope.metrics import Evaluation
from pneumoscope.narration import Narration, seconds_text
from pneumoscope.predictions import Predictions
from pneumoscope.repeats import HELD_OUT
from pneumoscope.runs import Run
from pneumoscope.scorecard import SCORED, Choice, Scorecard
from pneumoscope.specs import TITLES, Spec
from pneumoscope.store import ImageStore

WHOLE_LOSS_TOLERANCE = 0.005
"""Between the loss of the trained tail on stored float16 features and that of the whole saved model, in nats."""

SHIFT_IMAGES = 1000
"""At most so many images of a label and split are compared with those of another; more would cost, not tell, more."""


@dataclass(frozen=True)
class Examiner:
    """Measures models on one set of images and writes what it finds into one run directory.

    Attributes
    ----------
    spec : Spec
        How to measure.
    run : Run
        Where figures and tables go; its models are measured unless others are named.
    catalog : Catalog
        Which images, divided.
    store : ImageStore
        Their pixels.
    reference : tuple of Catalog and ImageStore, optional
        The training images; None where they are gone.
    measured : DataFrame, optional
        The files' measures that the shortcut baseline learns from; None where there is nothing to learn from.
    voice : Narration
        Who speaks.
    note : str
        Stands on every output.
    """

    spec: Spec
    run: Run
    catalog: Catalog
    store: ImageStore
    reference: tuple[Catalog, ImageStore] | None
    measured: pd.DataFrame | None
    voice: Narration
    note: str

    def examine(
        self,
        *,
        models_of: Run | None = None,
        choices: Mapping[str, Choice] | None = None,
        chosen_on: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Score every model once, measure everything, note that the test images were looked at, and write it all.

        Where the images are the run's own, its gallery and its model card are made anew as well.

        Parameters
        ----------
        models_of : Run, optional
            Whose models to measure, where these images are not their own.
        choices : mapping of str to Choice, optional
            By approach: thresholds and temperature to carry over; chosen anew where not given.
        chosen_on : str, optional
            The split that `choices` came from.

        Returns
        -------
        dict of str to dict
            By approach: how fast it scored, see `speed`.

        Raises
        ------
        PneumoscopeError
            Where a model cannot be loaded or does not score as it did in training, or a file cannot be written.
        """
        source = models_of or self.run
        # a fold is judged by what it held out: its look at the test images would be one more
        held_back = self.spec.split.folds and models_of is None
        wanted = [split for split in SCORED if not (held_back and split == "test")]
        rows = {split: part for split in wanted if len(part := self.catalog.rows(split))}
        models: dict[str, dict[str, Predictions]] = {}
        speeds: dict[str, dict[str, Any]] = {}
        for name in source.trained():
            with self.voice.stage(f"Scoring {name}"):
                scored = {split: self._score(name, source.model_path(name), split) for split in rows}
                models[name] = {split: predictions for split, (predictions, _) in scored.items()}
                speeds[name] = speed(sum(map(len, models[name].values())), sum(took for _, took in scored.values()))
                if models_of is None:
                    self._check_whole(name, models[name]["validation"])
        with self.voice.stage("Measuring"):
            card = scorecard.measure(
                models,
                self._shortcuts(rows),
                rows=rows,
                spec=self.spec.evaluation,
                choices=choices,
                chosen_on=chosen_on,
                seed=self.spec.seed,
                announce=self._say_cost,
            )
            looked = self._note_look(card, rows, source)  # before anything that could fail: the images were seen
            for name, parts in models.items():
                for split, predictions in parts.items():
                    self._write_scores(name, predictions, card.models[name].evaluations[split])
        self._write_metrics(card, self._unlike(rows) | looked)
        if models_of is None:
            gallery.write(self.run, self.catalog, self.store, narration=self.voice)
            model_card.write_card(self.run)
        return speeds

    def _say_cost(self, seconds: float) -> None:
        self.voice.say(
            f"  Bootstrap by group, {self.spec.evaluation.bootstrap:,} resamples: about {seconds_text(seconds)} "
            "(evaluation.bootstrap)."
        )

    def _shortcuts(self, rows: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Predictions]]:
        """Score the baselines that see no lung; there are none for data without training images."""
        if self.measured is None:
            return {}
        usable = self.catalog.rows()
        found = {
            "file-and-grey": shortcut.baseline(usable, measured=self.measured),
            "border-only": shortcut.border_probe(usable, store=self.store),
        }
        return {name: {split: part.of_split(split) for split in rows} for name, part in found.items()}

    def _unlike(self, rows: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
        """Ask whether test images differ from the training images, as sets and one by one, to a frozen backbone."""
        if self.reference is None or "test" not in rows:
            return {"shift": {"reason": "There are no training images, or no test images, to compare."}}
        catalog, store = self.reference
        train = _sampled(catalog.rows("train"), seed=self.spec.seed)
        test = _sampled(rows["test"], seed=self.spec.seed)
        held = next(part for split in reversed(HELD_OUT) if len(part := catalog.rows(split)))
        known = pd.concat(map(catalog.rows, ("train", *HELD_OUT))) if self.spec.features.cache else None
        with self.voice.stage("Comparing test with training images"), self.voice.bar("features") as progress:
            try:
                of_train, of_held = (
                    features.frozen(part, store, spec=self.spec, among=known, progress=progress)
                    for part in (train, _sampled(held, seed=self.spec.seed))
                )
                of_test = features.frozen(test, self.store, spec=self.spec, progress=progress)
                found = shift.two_sample_by_label(
                    _as_sample("train", train, of_train), _as_sample("test", test, of_test), seed=self.spec.seed
                )
            except (WeightsError, DataError) as error:  # no backbone here, or the same patients in both
                return {"shift": {"reason": str(error)}}
            labels = {"shift": {label: one.as_dict() for label, one in found.items()}}
            try:
                usual = Familiarity.fit(of_train, held_out=of_held)
            except DataError as error:  # random weights may tell no image from another
                return labels | {"not_assessable": {"sentence": str(error)}}
        expected = max(1 - usual.quantile, 1 / (usual.n_held_out + 1))  # few images cannot show a small share
        unlike = Share(int((~usual.assess(of_test)[1]).sum()), len(test))
        sentence = (
            f"To the pretrained layers {unlike.part:,} of {unlike.whole:,} test images are unlike the training images "
            f"(of held-out images, {expected:.0%} would be): what a model says of those cannot be assessed."
        )
        return labels | {"not_assessable": {**unlike.as_dict(), "threshold": usual.threshold, "sentence": sentence}}

    def _note_look(self, card: Scorecard, rows: Mapping[str, pd.DataFrame], source: Run) -> dict[str, Any]:
        """Write every scoring of the test images into the ledger, and return how often they were looked at."""
        if "test" not in rows:
            return {}
        book, test_set = Ledger.in_cache(), ledger.test_set_of(rows["test"]["image_id"].tolist())
        for name, model in card.models.items():
            seen = model.evaluations["test"]
            model_hash = _files.sha256_of_file(source.model_path(name))
            book.append(Look(test_set, self.spec.hash, model_hash, name, seen.n, seen.roc.auc, seen.at_half.accuracy))
        return {"test_set": book.summary(test_set)}

    def _check_whole(self, name: str, validation: Predictions) -> None:
        """Refuse a saved model that does not score as it did, or as its tail on stored features did, in training."""
        rows = _files.read_csv(self.run.table_path(name, "loss_per_epoch"))
        losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]  # one that was not a number stands empty
        found = metrics.log_loss(validation.labels, validation.scores)
        # the kept epoch is not always that of the lowest loss: a gain below train.min_delta does not count
        nearest = min(losses, key=lambda loss: abs(loss - found), default=float("nan"))
        if not abs(nearest - found) <= WHOLE_LOSS_TOLERANCE:
            raise RunError(
                f"The saved model {self.run.model_path(name)} has a validation loss of {found}, while training saw "
                f"{nearest}; the stored features do not fit it: run pneumoscope cache --clean and train it again."
            )

    def _score(self, name: str, path: Path, split: str) -> tuple[Predictions, float]:
        """Return the scores, and the seconds that scoring took once the model was loaded."""
        model = inference.load_model(path, approach=name, spec=self.spec)
        with self.voice.bar(f"{name} {split}") as progress:
            started = time.perf_counter()
            predictions = inference.score(
                model,
                self.store,
                self.catalog.rows(split),
                batch_size=self.spec.train.batch_size,
                progress=progress,
            )
            return predictions, time.perf_counter() - started

    def _write_scores(self, name: str, predictions: Predictions, evaluation: Evaluation) -> None:
        split = str(predictions.table["split"].iloc[0])
        table = predictions.table
        _files.write_csv(
            self.run.table_path(name, f"{split}_yscores"),
            ["y_true", "y_scores", "image_id", "path"],
            zip(table["label"].tolist(), table["score"].tolist(), table["image_id"], table["path"], strict=True),
        )
        roc = evaluation.roc
        _files.write_csv(
            self.run.table_path(name, f"{split}_roc"),
            ["fpr", "tpr", "thresholds"],
            zip(roc.fpr.tolist(), roc.tpr.tolist(), roc.thresholds.tolist(), strict=True),
        )
        shown = "testing" if split == "test" else split
        point = next(iter(evaluation.operating_points.items()), None)
        marker = None
        if point is not None and point[1].specificity is not None and point[1].sensitivity is not None:
            marker = (1 - point[1].specificity, point[1].sensitivity, point[0])
        figure = figures.roc_curve(
            roc, title=f"{TITLES[name]} ({name}): ROC, {shown} images", note=self.note, point=marker
        )
        figures.save(figure, self.run.figure_path(f"{name}_roc_curve_{shown}"))

    def _write_metrics(self, card: Scorecard, further: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` and ``metrics.csv``, and show one table per split with the verdicts under it."""
        content = {"note": self.note, **card.as_dict(), **further}
        _files.write_json(self.run.metrics_path, content)
        _files.write_csv(self.run.metrics_csv_path, ["model", "split", "metric", "value"], scorecard.as_rows(content))
        for split in card.splits:
            n = next(iter(card.models.values())).evaluations[split].n
            title = f"Results on {split}, {n:,} images" + (f" - {self.note}" if self.note else "")
            self.voice.table(title, scorecard.TABLE_HEAD, card.table(split))
            for sentence in card.verdicts(split):
                self.voice.say(f"  {sentence}")
        for found in further["shift"].values():
            self.voice.say(f"  {found['sentence'] if isinstance(found, Mapping) else found}")
        for key in ("not_assessable", "test_set"):
            if key in further:
                self.voice.say(f"  {further[key]['sentence']}")
        if card.chosen_on == "validation" and "validation" in card.splits:
            self.voice.say(
                "  Thresholds and temperature come from the validation images, which also steered the training; "
                "split.calibration keeps images apart for them."
            )


def speed(images: int, seconds: float, *, of: str = "images") -> dict[str, Any]:
    """Say how fast images went through, as a stage's record keeps it.

    Parameters
    ----------
    images : int
        How many.
    seconds : float
        In how long.
    of : str
        What went through: ``images``, or ``stored features`` of them.

    Returns
    -------
    dict
        ``of``, ``images``, ``seconds`` and ``images_per_second``; the last is None where no time passed.
    """
    return {"of": of, "images": images, "seconds": seconds, "images_per_second": images / seconds if seconds else None}


def _sampled(rows: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Return at most `SHIFT_IMAGES` images of each label, in the order of `rows`."""
    parts = [part.sample(min(SHIFT_IMAGES, len(part)), random_state=seed) for _, part in rows.groupby("label")]
    return pd.concat(parts).sort_index().reset_index(drop=True)


def _as_sample(name: str, rows: pd.DataFrame, values: npt.NDArray[np.float32]) -> shift.Sample:
    return shift.Sample(name, values, rows["group"].to_numpy(dtype=str), rows["label"].to_numpy(dtype=np.int8))
