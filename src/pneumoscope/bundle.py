"""The Bundle: what leaves a run for use, files that need neither Keras nor pickle.

Owns ``model.onnx`` and ``bundle.json`` on the disk, their hash, and running the network with onnxruntime. Knows nothing
of where a bundle comes from (`export`) or who asks it (`predictor`).

A folder::

    BUNDLE/model.onnx    input image, uint8 (B, H, W); outputs score, logit, bias (B,), evidence (B, h, w) and
                         features (B, d), float32
           bundle.json   predictor.Description, how the two networks were compared, and the SHA-256 of model.onnx
           model_card.md what `card` makes of bundle.json; a person goes on with it, so its hash is kept nowhere
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from pneumoscope import _files, _onnxruntime, card
from pneumoscope.errors import StoreError
from pneumoscope.predictor import Description, Outputs, Predictor

LARGEST_BYTES: Final = 2**30
"""A larger network is refused unread: the largest of ours, a ResNet152V2, is 235 MB."""


class OnnxNetwork:
    """An ONNX file as a `predictor.Network`; from bytes, so that no other file is ever read beside it.

    Parameters
    ----------
    data : bytes
        The ONNX file.
    name : str
        What errors call it.
    threads : int
        CPU threads for one batch; 0 takes all cores.
    spinning : bool
        Whether threads that have nothing to do keep their cores busy: a little quicker alone, far slower where others
        want the cores.

    Raises
    ------
    StoreError
        Where onnxruntime cannot load it or it is not a network of ours.
    """

    def __init__(self, data: bytes, *, name: str, threads: int = 0, spinning: bool = True) -> None:
        onnxruntime = _onnxruntime.load()  # late: a look at bundle.json does not need it
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.log_severity_level = 3  # errors; they are raised as well
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base of their own
            raise StoreError(f"onnxruntime cannot load {name} ({_first_line(error)}); export it again.") from error
        given = [node.name for node in self._session.get_inputs()]
        found = {node.name for node in self._session.get_outputs()}
        if given != ["image"] or not set(Outputs._fields) <= found:
            raise StoreError(
                f"{name} takes {', '.join(given)} and returns {', '.join(sorted(found))}; expected image, and "
                f"{', '.join(Outputs._fields)}. Export it again."
            )

    def __call__(self, images: npt.NDArray[np.uint8]) -> Outputs:
        """Run a batch of shape ``(n, size_px, size_px)``."""
        return Outputs(*self._session.run(list(Outputs._fields), {"image": images}))


@dataclass(frozen=True)
class Bundle:
    """A bundle on the disk, its hash checked.

    Attributes
    ----------
    folder : Path
        Where it lies.
    description : Description
        What it is.
    content : mapping
        All of ``bundle.json``.
    """

    folder: Path
    description: Description
    content: Mapping[str, Any]

    @classmethod
    def write(
        cls, folder: Path, *, network: bytes, description: Description, further: Mapping[str, Any] | None = None
    ) -> Self:
        """Write a bundle whole or not at all.

        Parameters
        ----------
        folder : Path
            New; or an earlier bundle, which is replaced.
        network : bytes
            The ONNX file.
        description : Description
            What it is.
        further : mapping, optional
            More for ``bundle.json``.

        Returns
        -------
        Bundle

        Raises
        ------
        StoreError
            Where the folder holds something else than a bundle.
        PneumoscopeError
            Where it cannot be written.
        """
        cls.require_free(folder)
        content = {**description.as_dict(), **(further or {}), "sha256": _files.sha256_of(network)}
        _files.write_bytes(folder / "model.onnx", network)
        card.put(folder / "model_card.md", card.text_of_bundle(content))
        _files.write_json(folder / "bundle.json", content)  # last: its hash makes the bundle whole
        return cls.open(folder)

    @staticmethod
    def require_free(folder: Path) -> None:
        """Refuse a folder that `write` would refuse, before the work is done.

        Raises
        ------
        StoreError
            Where the folder holds something else than a bundle.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not is_bundle(folder):
            raise StoreError(f"{folder} is there and is no bundle; choose a new folder with -o.")

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a bundle; one whose network is not the one that its JSON names is refused.

        Parameters
        ----------
        folder : Path
            As `write` made it.

        Returns
        -------
        Bundle

        Raises
        ------
        StoreError
            Where it is none, or damaged or changed.
        """
        if not is_bundle(folder):
            raise StoreError(f"{folder} is not a bundle (it holds no bundle.json); make one with pneumoscope export.")
        content = _files.read_json(folder / "bundle.json")
        network = folder / "model.onnx"
        if not network.is_file():
            raise StoreError(f"The bundle {folder} holds no model.onnx; export it again.")
        if network.stat().st_size > LARGEST_BYTES:
            raise StoreError(
                f"{network} has {_files.size_text(network.stat().st_size)}; at most "
                f"{_files.size_text(LARGEST_BYTES)} are read. Export it again."
            )
        if _files.sha256_of_file(network) != content.get("sha256"):
            raise StoreError(
                f"{network} is not the network that bundle.json names (its SHA-256 differs): it was changed or "
                "damaged, and is not used; export it again."
            )
        return cls(folder, Description.from_dict(content), content)

    def predictor(self, *, threads: int = 0, spinning: bool = True) -> Predictor:
        """Load the network.

        Parameters
        ----------
        threads : int
            CPU threads for one batch; 0 takes all cores.
        spinning : bool
            See `OnnxNetwork`.

        Returns
        -------
        Predictor

        Raises
        ------
        StoreError
            Where it was changed since `open`, onnxruntime cannot load it, or it is not a network of ours.
        """
        name = str(self.folder / "model.onnx")
        network = OnnxNetwork(self.network_bytes(), name=name, threads=threads, spinning=spinning)
        return Predictor(self.description, network)

    def network_bytes(self) -> bytes:
        """Read the network, which is what its hash names also where the file was changed since `open`.

        Raises
        ------
        StoreError
            Where it was changed.
        """
        path = self.folder / "model.onnx"
        data = path.read_bytes()
        if _files.sha256_of(data) != self.content["sha256"]:
            raise StoreError(f"{path} was changed while it was in use; export the bundle again.")
        return data


def is_bundle(folder: Path) -> bool:
    """Return whether a folder holds a bundle, whole or damaged."""
    return (folder / "bundle.json").is_file()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
