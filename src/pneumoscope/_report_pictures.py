"""The pictures of a report: what ``gallery.json`` names, taken into the page itself as far as there is room.

Owns which files are accepted (a plain name in the gallery's folder, a JPEG or PNG by its first bytes, not too large)
and what is said in place of one that is not. Draws and decodes nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pneumoscope import _files
from pneumoscope._report_blocks import Block, Case, Cases, Picture, Pictures, Section, Text, counted, plain
from pneumoscope._report_material import Material, is_plain_name, mapping, mappings, number, words

MAX_PICTURE_BYTES: Final = 400_000
"""A single picture larger than this is left out."""

KINDS: Final[Mapping[str, str]] = {
    "false_negative": "Missed: PNEUMONIA called NORMAL",
    "false_positive": "False alarm: NORMAL called PNEUMONIA",
    "true_positive": "Typical hit: PNEUMONIA called so",
    "true_negative": "Typical hit: NORMAL called so",
}
"""Kinds of case in the order in which they are shown."""

_MAGIC: Final[Mapping[bytes, str]] = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_MAX_CASES: Final = 400  # cards of a model; more are not looked at one by one
_DAMAGED: Final = "gallery.json is damaged"


@dataclass
class Album:
    """The pictures in a folder, taken one by one until the room is used up.

    Attributes
    ----------
    folder : Path
        Where they lie.
    room : int
        Bytes that may still be taken; base64 makes a third more of them.
    left_out : list of str
        Names of pictures for which there was no room.
    """

    folder: Path
    room: int
    left_out: list[str] = field(default_factory=list)

    def take(self, name: object, *, caption: str) -> Picture:
        """Return a picture, or what is said in its place.

        Parameters
        ----------
        name : object
            Of its file, as ``gallery.json`` has it; it may be anything.
        caption : str
            Under it.

        Returns
        -------
        Picture
        """
        if not isinstance(name, str) or not name:
            return Picture("", caption, "no picture")
        if not is_plain_name(name):
            return Picture("", caption, "left out: not the name of a picture")
        path = self.folder / name
        try:
            if path.is_symlink() or not path.is_file():
                return Picture("", caption, "the picture is missing")
            size = path.stat().st_size
            if size > min(MAX_PICTURE_BYTES, self.room):
                self.left_out.append(name)
                return Picture("", caption, f"left out for its size ({_files.size_text(size)})")
            data = path.read_bytes()
        except OSError as error:
            return Picture("", caption, f"cannot be read ({error.strerror or error})")
        kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
        if kind is None:
            return Picture("", caption, "left out: neither JPEG nor PNG")
        self.room -= len(data)
        return Picture(f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", caption)

    def said(self) -> list[Text]:
        """Return a sentence about what was left out; none where all found room."""
        if not self.left_out:
            return []
        were = "picture was" if len(self.left_out) == 1 else "pictures were"
        text = f"{len(self.left_out):,} {were} left out to keep this file small; they lie in {self.folder.name}/."
        return [Text(text, "warning")]


def album_of(material: Material, *, room: int) -> Album:
    """Return a run's album, with room for so many bytes."""
    return Album(material.run.gallery_path.parent, room)


def gallery(material: Material, album: Album) -> Section:
    """Return the gallery: the worst errors and typical hits of every model, each with its evidence map.

    Parameters
    ----------
    material : Material
        With what ``gallery.json`` held.
    album : Album
        Takes the pictures.

    Returns
    -------
    Section
    """
    name, title = "gallery", "Errors and hits, one by one"
    if "gallery" in material.missing:
        return Section(name, title, missing=material.missing["gallery"])
    models = material.gallery.get("models")
    if reason := words(material.gallery.get("reason")):
        return Section(name, title, missing=reason)
    if not isinstance(models, Mapping):
        return Section(name, title, missing=f"{_DAMAGED}: it names no models; make the gallery again.")
    cases = [case for model, found in models.items() for case in _cases_of(model, mapping(found), album)]
    if not cases:
        return Section(name, title, missing="gallery.json holds no case.")
    split = words(material.gallery.get("split")) or "test"
    lead = (
        f"From the {split} images, at each model's operating point; the worst come first. Red speaks for PNEUMONIA, "
        "blue against it: where the model took its evidence from, not where the disease is."
    )
    blocks: list[Block] = [*album.said(), Cases(cases)]
    return Section(name, title, blocks, lead=lead)


def samples(material: Material, album: Album) -> list[Block]:
    """Return sample pictures by split and label, empty where the gallery has none."""
    found: list[Block] = []
    for split, by_label in mapping(material.gallery.get("samples")).items():
        for label, pictures in mapping(by_label).items():
            shown = _pictures(mappings(pictures), album)
            if shown:
                found.append(Pictures(f"{plain(label)}, {plain(split)}", shown))
    return found


def finding_pictures(material: Material, album: Album) -> dict[str, Pictures]:
    """Return the pictures of the audit's findings, by the finding's name."""
    found: dict[str, Pictures] = {}
    for finding in mappings(material.gallery.get("findings")):
        name, shown = words(finding.get("name")), _pictures(mappings(finding.get("pictures")), album)
        if name and shown:
            found[name] = Pictures(f"{plain(name)}: {counted(len(shown), 'picture')}", shown)
    return found


def _pictures(entries: Sequence[Mapping[str, Any]], album: Album) -> list[Picture]:
    return [album.take(one.get("picture"), caption=plain(one.get("path", ""))) for one in entries[:24]]


def _cases_of(model: str, found: Mapping[str, Any], album: Album) -> list[Case]:
    order = {kind: at for at, kind in enumerate(KINDS)}
    known = [case for case in mappings(found.get("cases")) if words(case.get("kind")) in order]
    known.sort(key=lambda case: (order[case["kind"]], number(case.get("rank")) or 0))
    return [_case(model, case, album) for case in known[:_MAX_CASES]]


def _case(model: str, case: Mapping[str, Any], album: Album) -> Case:
    path = plain(case.get("path", ""))
    return Case(
        model=plain(model),
        case=case["kind"],
        case_title=KINDS[case["kind"]],
        rank=int(number(case.get("rank")) or 0),
        score=number(case.get("score")),
        label=plain(case.get("label", "")),
        subtype=plain(case.get("subtype") or ""),
        group=plain(case.get("group") or ""),
        path=path,
        image=album.take(case.get("picture"), caption=f"X-ray {path}"),
        evidence=album.take(case.get("evidence"), caption=f"Evidence map of {plain(model)} for {path}"),
    )
