"""The model that comes with the package: whole, small, known by its answers, and asked where none is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pneumoscope import _chosen, cli, phantom
from pneumoscope.bundle import Bundle
from pneumoscope.predictor import Predictor

KNOWN = {(0, 1): 0.73223, (0, 2): 0.04353, (0, 3): 0.50739, (1, 1): 0.89832, (1, 2): 0.11237, (1, 3): 0.76491}
"""Its score of a synthetic radiograph, by label and seed: no sign of quality, but of the same network and pixels."""


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    found = _chosen.find(None)
    assert isinstance(found, Bundle)
    return found


@pytest.fixture(scope="module")
def predictor(shipped: Bundle) -> Predictor:
    return shipped.predictor(threads=1)


def test_it_scores_a_few_synthetic_images_as_it_did_when_it_was_made(predictor: Predictor) -> None:
    drawn = np.stack([phantom.draw(label, seed=seed, width_px=224, height_px=224) for label, seed in KNOWN])
    assert predictor.network(drawn).score == pytest.approx(list(KNOWN.values()), abs=1e-3)


def test_originals_are_called_as_the_thumbnails_of_them(predictor: Predictor, real_data: Path) -> None:
    originals = {path.name: path for path in (real_data / "full_resolution").rglob("*.jpeg")}
    thumbnails = {path.name: path for path in (real_data / "chest_xray").rglob("*.jpeg") if path.name in originals}
    assert len(thumbnails) == len(originals) == 109
    calls = [
        [answer.call for answer in predictor.answer([predictor.read(where[name].read_bytes()) for name in originals])]
        for where in (originals, thumbnails)
    ]
    assert sum(a != b for a, b in zip(*calls, strict=True)) <= 1


def test_it_is_small_and_holds_three_files(shipped: Bundle) -> None:
    files = sorted(shipped.folder.iterdir())
    assert [path.name for path in files] == ["bundle.json", "model.onnx", "model_card.md"]
    assert sum(path.stat().st_size for path in files) < 12e6


def test_its_card_and_description_say_what_it_is_from_and_how_good(shipped: Bundle) -> None:
    card = (shipped.folder / "model_card.md").read_text(encoding="utf-8")
    for words in ("Research use only, not a medical device", "10.17632/rscbjbr9sj", "CC BY 4.0", "Not for adults"):
        assert words in card
    figures = shipped.content["metrics"]["test"]
    assert figures["n"] == 651
    assert figures["auc"] >= 0.997
    point = figures["operating_point"]
    assert point["sensitivity"] >= 0.97
    assert point["specificity"] >= 0.95
    assert shipped.content["chosen_on"] == "calibration"
    assert shipped.content["jpeg_quality"] == 75
    assert "compressed as a JPEG of quality 75" in card


def test_it_tells_nothing_of_the_machine_it_was_made_on_but_its_kind(shipped: Bundle) -> None:
    text = json.dumps(shipped.content)
    assert not any(word in text for word in ("/home", "/tmp", "/work", "/root", "-v6"))


ASKED = """
from pneumoscope import _chosen, _onnxruntime
_chosen.find(None).predictor(threads=1)
_onnxruntime.load("onnxruntime.quantization")
"""


def test_asking_it_writes_nothing_into_the_home_of_its_user(tmp_path: Path) -> None:
    """As onnxruntime does where nobody keeps it from it: what it runs on, to be sent to its maker."""
    home = {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}  # without the signs of a CI, where it keeps still
    subprocess.run([sys.executable, "-c", ASKED], env=home, check=True)
    assert list(tmp_path.rglob("*")) == []


def test_where_no_model_is_named_it_answers(
    tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = phantom.draw(1, seed=1, width_px=224, height_px=224)
    Image.fromarray(picture).save(tmp_path / "x.png")
    words = ["pneumoscope", "predict", str(tmp_path / "x.png"), "--csv", str(tmp_path / "answers.csv")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert out.startswith("Asking the model that comes with the package: made from X-rays of children of one to five")
    _, row = (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()
    expected = predictor.answer([predictor.read((tmp_path / "x.png").read_bytes())])[0]
    assert float(row.split(",")[1]) == pytest.approx(expected.score, abs=1e-5)
