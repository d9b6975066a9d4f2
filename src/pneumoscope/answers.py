"""Many images, one model: a table of answers on the screen and as CSV, and pictures of the evidence.

Owns the way from inputs to answers (read ahead, in batches, in order), the columns of the CSV, the names of the
pictures and what is said at the end. Knows nothing of where a model or the list of files comes from.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from pneumoscope import _files, evidence, figures
from pneumoscope._inputs import EVIDENCE_SUFFIX, Input
from pneumoscope._sources import Reader
from pneumoscope.errors import DataError, ImageError, PneumoscopeError, UsageError
from pneumoscope.narration import Narration
from pneumoscope.predictor import Answer, Description, Picture, Predictor
from pneumoscope.specs import LABELS, RESEARCH_USE

COLUMNS: Final = ("file", "score", "call", "assessable", "reason")
"""Of the CSV."""

SHOWN: Final = 40
"""Rows of the table on the screen; the CSV has all."""

OCCLUSION_SCALE: Final = 1.0
"""What gets full colour in a map of occlusion: the logit changes by so much when a square is hidden."""

OCCLUSION_SQUARES: Final = 14
"""Squares along a side that occlusion hides, one after the other."""

_READERS: Final = 4  # threads; decoding lets go of the interpreter's lock
_REASON_CHARACTERS: Final = 60  # of a reason on the screen
_NAME_CHARACTERS: Final = 36  # of a file on a terminal: what 80 columns leave
_NAME_BYTES: Final = 120  # of a picture's name; file systems take 255
_UNSAFE: Final = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, eq=False)
class Answered:
    """One input and what came of it.

    Attributes
    ----------
    name : str
        As in the arguments.
    picture, answer : Picture, Answer or None
        None where the file could not be read.
    reason : str
        Of the answer, or why there is none.
    """

    name: str
    picture: Picture | None
    answer: Answer | None
    reason: str

    @property
    def assessable(self) -> str:
        """``yes``, ``no`` (also for what could not be read) or ``unknown``."""
        known = False if self.answer is None else self.answer.assessable
        return "unknown" if known is None else "yes" if known else "no"

    @property
    def row(self) -> tuple[str, float | None, str, str, str]:
        """Its cells, in the order of `COLUMNS`; the score reads back as the very same number."""
        score, call = (None, "") if self.answer is None else (self.answer.score, self.answer.call)
        return self.name, score, call, self.assessable, self.reason


@dataclass
class Summary:
    """What came of all inputs.

    Attributes
    ----------
    n : int
        Inputs.
    calls : mapping of str to int
        How many were called what.
    not_assessable, unknown : int
        Images that are not assessable, or not known to be.
    unreadable : int
        Inputs that could not be read as an image.
    operating_point, threshold : str, float
        What the calls were made with.
    csv, evidence : Path or None
        Where the table and the pictures are.
    """

    operating_point: str
    threshold: float
    csv: Path | None = None
    evidence: Path | None = None
    n: int = 0
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LABELS, 0))
    not_assessable: int = 0
    unknown: int = 0
    unreadable: int = 0

    def add(self, one: Answered) -> None:
        """Count one more."""
        self.n += 1
        if one.answer is None:
            self.unreadable += 1
            return
        self.calls[one.answer.call] += 1
        self.not_assessable += one.assessable == "no"
        self.unknown += one.assessable == "unknown"


def predict(
    predictor: Predictor,
    inputs: Sequence[Input],
    *,
    csv: Path | None = None,
    evidence: Path | None = None,
    occlusion: bool = False,
    narration: Narration | None = None,
    batch_size: int = 32,
) -> Summary:
    """Answer about files: a table on the screen, the whole of it as CSV, a picture of the evidence for each image.

    Parameters
    ----------
    predictor : Predictor
        The model; calls are made at its default operating point.
    inputs : sequence of Input
        From `_inputs.find`.
    csv : Path, optional
        File for all rows, with the columns `COLUMNS`; what stood there is replaced once the last row is there.
    evidence : Path, optional
        Folder for one PNG an image, named for it; pictures of an earlier call are replaced.
    occlusion : bool
        Draw beside each map how the logit changes when places are hidden; needs `evidence`, takes some 200 times as
        long as the answer.
    narration : Narration, optional
        Who speaks; silent where not given.
    batch_size : int
        Images in a step of the network.

    Returns
    -------
    Summary

    Raises
    ------
    DataError
        Where not one input could be read; the CSV is written all the same.
    UsageError
        Where `csv` or `evidence` is no place to write to, or occlusion has no folder.
    PneumoscopeError
        Where something cannot be written.
    """
    voice = narration or Narration("silent")
    _require_places(inputs, csv, evidence, occlusion=occlusion)
    summary = Summary(*predictor.description.point, csv, evidence)
    draw = None if evidence is None else _Drawer(predictor, evidence, occlusion=occlusion)
    shown: list[Answered] = []

    def rows(stream: Iterator[Answered], progress: Callable[[int, int], None]) -> Iterator[tuple[object, ...]]:
        for one in stream:
            summary.add(one)
            drawn = draw(one) if draw is not None else None
            if len(shown) < SHOWN:
                shown.append(Answered(one.name, None, one.answer, one.reason))
            if voice.mode == "json":
                voice.event("answer", one.name, **_values(one, drawn))
            progress(summary.n, len(inputs))
            yield one.row

    with voice.bar("answering") as progress, closing(answered(predictor, inputs, batch_size=batch_size)) as stream:
        if csv is not None:
            _files.write_csv(csv, COLUMNS, rows(stream, progress))
        else:
            deque(rows(stream, progress), maxlen=0)
    _report(summary, shown, predictor.description, voice)
    if summary.unreadable == summary.n:
        first = f"; the first, {shown[0].name!r}: {shown[0].reason}" if shown else ""
        raise DataError(f"No image could be read ({summary.n:,} files tried){first} Give JPEG, PNG or DICOM files.")
    return summary


def answered(predictor: Predictor, inputs: Sequence[Input], *, batch_size: int = 32) -> Generator[Answered, None, None]:
    """Answer about files in their order, reading ahead of the network; at most two batches of them are in memory.

    Parameters
    ----------
    predictor : Predictor
        The model.
    inputs : sequence of Input
        What to read.
    batch_size : int
        Images in a step of the network.

    Yields
    ------
    Answered
        One for each input.
    """
    reader, coming = Reader(), iter(inputs)
    waiting: deque[Future[Picture | str]] = deque()
    names: deque[str] = deque()
    pool = ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), thread_name_prefix="reading")
    try:
        while True:
            for one in itertools.islice(coming, 2 * batch_size - len(waiting)):
                waiting.append(pool.submit(_read, predictor, one, reader))
                names.append(one.name)
            if not waiting:
                return
            read = [waiting.popleft().result() for _ in range(min(batch_size, len(waiting)))]
            answers = iter(predictor.answer([one for one in read if isinstance(one, Picture)]))
            for one_read in read:
                if isinstance(one_read, str):
                    yield Answered(names.popleft(), None, None, one_read)
                else:
                    answer = next(answers)
                    yield Answered(names.popleft(), one_read, answer, answer.reason)
    finally:
        pool.shutdown(cancel_futures=True)


def _read(predictor: Predictor, one: Input, reader: Reader) -> Picture | str:
    """Return the decoded image, or why there is none."""
    try:
        return predictor.read(one.read(reader))
    except ImageError as error:
        return str(error)


def _require_places(inputs: Sequence[Input], csv: Path | None, folder: Path | None, *, occlusion: bool) -> None:
    """Find out before the work, not after it, that its results have no place."""
    if occlusion and folder is None:
        raise UsageError("A map of occlusion is a picture; say with --evidence DIR where pictures go.")
    if csv is not None:
        if csv.is_dir():
            raise UsageError(f"{csv} is a folder; give the name of a CSV file to write.")
        alike = [one.place for one in inputs if one.place.name == csv.name and not one.fault]
        if csv.exists() and any(place.exists() and place.samefile(csv) for place in alike):
            raise UsageError(f"{csv} is one of the files to answer about; give another name for the CSV file.")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UsageError(f"{folder} is a file; give a folder for the pictures of the evidence.") from error
        except OSError as error:
            raise PneumoscopeError(
                f"Cannot make the folder {folder}: {error.strerror or error}; choose one that you may write to."
            ) from error


# --- pictures --------------------------------------------------------------------------------------------------------


class _Drawer:
    """Draws one picture an image into a folder, each under a name of its own."""

    def __init__(self, predictor: Predictor, folder: Path, *, occlusion: bool) -> None:
        self._predictor, self._folder, self._occlusion = predictor, folder, occlusion
        self._taken: set[str] = set()
        self._numbers: Counter[str] = Counter()

    def __call__(self, one: Answered) -> Path | None:
        """Draw the picture; one that cannot be read takes its name too, so that no other name hangs on it."""
        path = self._folder / self._name_for(one.name)
        if one.picture is None or one.answer is None:
            return None
        known = self._predictor.description
        layers = [_layer(one.picture, one.answer.evidence, known)]
        if self._occlusion:
            layers.append(occlusion_layer(self._predictor, one.picture.pixels))
        figure = figures.evidence_panel(
            one.picture.pixels,
            layers,
            title=one.name,
            said=said_of(one.answer),
            aspect=one.picture.height_px / one.picture.width_px,
            note=known.note,
        )
        figures.save(figure, path)
        return path

    def _name_for(self, name: str) -> str:
        stem = safe_stem(name)
        key = stem.casefold()  # some file systems do not tell A from a
        while key in self._taken:
            self._numbers[stem.casefold()] += 1
            key = f"{stem.casefold()}-{self._numbers[stem.casefold()] + 1}"
        self._taken.add(key)
        number = self._numbers[stem.casefold()]
        return f"{stem}{f'-{number + 1}' if number else ''}{EVIDENCE_SUFFIX}"


def safe_stem(name: str) -> str:
    """Return a file name without suffix that means nothing to any shell or file system, from an input's name.

    Letters and digits of all scripts, ``_``, ``-`` and ``.`` stay; it never begins with a dot or a dash.
    """
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    stem = last.rpartition(".")[0] or last
    plain = _UNSAFE.sub("_", unicodedata.normalize("NFC", stem.encode("utf-8", "replace").decode()))
    return plain.encode()[:_NAME_BYTES].decode(errors="ignore").strip("._-") or "image"


def said_of(answer: Answer) -> tuple[str, ...]:
    """Return the lines that stand over a picture of evidence: the call, what the logit is made of, doubts."""
    spread = float(answer.evidence.sum())
    point = f"{answer.operating_point} (score > {answer.threshold:.4f})"
    lines = [
        f"Score {answer.score:.4f}: called {answer.call} at the operating point {point}",
        f"Logit {answer.logit:+.2f} = evidence {spread:+.2f} and bias {answer.bias:+.2f}",
    ]
    doubt = "NOT ASSESSABLE. " if answer.assessable is False else ""
    return (*lines, f"{doubt}{answer.reason}") if answer.reason or doubt else tuple(lines)


def occlusion_layer(predictor: Predictor, image: npt.NDArray[np.uint8]) -> figures.Layer:
    """Draw how the logit changes when each place is hidden.

    Parameters
    ----------
    predictor : Predictor
        The model.
    image : ndarray of uint8, shape (size_px, size_px)
        As `Predictor.read` gives it.

    Returns
    -------
    figures.Layer
    """
    cell_px = max(1, round(len(image) / OCCLUSION_SQUARES))
    lost = evidence.occlusion(lambda changed: predictor.network(changed).logit, image, cell_px=cell_px)
    grid = evidence.Grid(first_px=(cell_px - 1) / 2, step_px=cell_px)
    return figures.Layer(
        evidence.overlay(image, lost, grid=grid, scale=OCCLUSION_SCALE),
        OCCLUSION_SCALE,
        "Occlusion: asks the score alone",
        f"Logit lost when a square of {cell_px} px is hidden",
    )


def _layer(picture: Picture, found: npt.NDArray[np.float32], known: Description) -> figures.Layer:
    pixels = evidence.overlay(picture.pixels, found, grid=known.grid, scale=known.evidence_scale)
    return figures.Layer(pixels, known.evidence_scale, "Evidence", "Units of the logit per cell of the map")


# --- what is said ----------------------------------------------------------------------------------------------------


def _values(one: Answered, drawn: Path | None) -> dict[str, object]:
    answer = one.answer
    return {
        "file": one.name,
        "score": answer and answer.score,
        "probability": answer and answer.probability,
        "call": answer and answer.call,
        "operating_point": answer and answer.operating_point,
        "assessable": False if answer is None else answer.assessable,
        "reason": one.reason,
        "evidence": drawn,
    }


def _report(summary: Summary, shown: Sequence[Answered], known: Description, voice: Narration) -> None:
    if shown:
        _show(shown, f"{known.title} ({known.model})", voice)
    if summary.n > len(shown):
        where = f"all are in {summary.csv}" if summary.csv else "--csv OUT keeps all"
        voice.say(f"{summary.n - len(shown):,} more are not shown; {where}.")
    for sentence in sentences(summary, known):
        voice.say(sentence)
    voice.event("predicted", RESEARCH_USE + ".", **asdict(summary), model=known.model, note=known.note)


def _show(shown: Sequence[Answered], title: str, voice: Narration) -> None:
    """Show rows; a terminal is narrow, so there names lose their beginning and each reason stands once, below."""
    rows, reasons = [], defaultdict[str, list[str]](list)
    narrow = voice.mode == "terminal"
    for one in shown:
        name, score, call, assessable, reason = one.row
        short = reason if len(reason) <= _REASON_CHARACTERS else f"{reason[: _REASON_CHARACTERS - 1]}…"
        if narrow and len(name) > _NAME_CHARACTERS:
            name = f"…{name[1 - _NAME_CHARACTERS :]}"
        rows.append([name, "" if score is None else f"{score:.4f}", call, assessable, short])
        reasons[reason].append(name)
    voice.table(title, COLUMNS[:-1] if narrow else COLUMNS, [row[:-1] for row in rows] if narrow else rows)
    for reason, names in reasons.items() if narrow else ():
        if reason:
            voice.say(f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {reason}")


def sentences(summary: Summary, known: Description) -> list[str]:
    """Return what is said under the table.

    Parameters
    ----------
    summary : Summary
        What came of all inputs.
    known : Description
        Of the model.

    Returns
    -------
    list of str
    """
    read = summary.n - summary.unreadable
    calls = ", ".join(f"{n:,} called {call}" for call, n in summary.calls.items())
    said = [f"{read:,} image{'' if read == 1 else 's'} answered: {calls}."]
    cost = ""
    if known.curve is not None:
        sensitivity, specificity = known.curve.at(summary.threshold)
        cost = f"; on {known.curve.split} it had sensitivity {sensitivity:.3f} and specificity {specificity:.3f}"
        cost += f" (chosen there, which flatters){_on_test(known, summary)}"
    said.append(f"Operating point {summary.operating_point}: PNEUMONIA where score > {summary.threshold:.4f}{cost}.")
    doubts: Mapping[str, int] = {
        "not assessable: do not use their scores": summary.not_assessable,
        "not known to be assessable": summary.unknown,
        "not readable as an image": summary.unreadable,
    }
    said += [f"{n:,} {what}." for what, n in doubts.items() if n]
    if summary.csv is not None:
        said.append(f"The table is in {summary.csv}.")
    if summary.evidence is not None and read:
        said.append(f"Pictures of the evidence are in {summary.evidence}.")
    return [*said, known.note] if known.note else said


def _on_test(known: Description, summary: Summary) -> str:
    """Say what a point achieved on the test images, where that is known of this very threshold and not one before."""
    of_test = known.metrics.get("test") or {}
    at = (of_test.get("operating_points") or {}).get(summary.operating_point) or {}
    if at.get("threshold") != summary.threshold:  # a site has chosen its own since
        return ""
    shares = []
    for name in ("sensitivity", "specificity"):
        sure = (at.get("group_intervals") or {}).get(name) or (at.get("intervals") or {}).get(name)
        if at.get(name) is None or sure is None:
            return ""
        shares.append(f"{name} {at[name]:.3f} ({sure['low']:.3f} to {sure['high']:.3f})")
    return f", on {of_test['n']:,} test images {' and '.join(shares)}"
