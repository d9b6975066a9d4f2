from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import Markup

from pneumoscope import _charts, curves
from pneumoscope.errors import UsageError

HOSTILE = "\"><script>alert('x')</script>\n=cmd()|\u202e\x00 & <b>"
EPOCHS: dict[str, _charts.Numbers] = {
    "epoch": [1, 2, 3, 4],
    "train_loss": [0.6, 0.4, 0.3, 0.2],
    "val_loss": [0.7, None, 0.4, 0.45],
    "train_accuracy": [0.7, 0.8, 0.9, 0.95],
    "val_accuracy": [0.6, 0.7, 0.85, 0.84],
}
BINS = ([0.1, 0.5, 0.9], [0.0, 0.4, 1.0], [0.0, 0.2, None], [0.2, 0.6, None], [10, 5, 40])
ROWS = [("AUC", 0.9, 0.85, 0.95, 0), ("Sensitivity", 0.8, None, None, 1), ("Specificity", None, None, None, 2)]
NO_NUMBER = (
    "A chart got what is no number (could not convert string to float: 'x'); pass numbers, or None where undefined."
)


def every(name: str = "ft") -> dict[str, Markup]:
    """One of each chart, with a name wherever a name goes."""
    return {
        "loss": _charts.learning_curves(EPOCHS, kind="loss", best_epoch=3, title=name),
        "accuracy": _charts.learning_curves(EPOCHS, kind="accuracy", best_epoch=None, title=name),
        "roc": _charts.roc(
            {name: ([0, 0, 1], [0, 0.9, 1], 0.97), "other": ([0, 0.1, 1], [0, 1, 1], 0.96)},
            title=name,
            points={name: (0.05, 0.92), f"{name}, a point": (0.1, 0.95)},
        ),
        "precision_recall": _charts.precision_recall(
            {name: ([1, 0.5, 0], [0.6, 0.9, 1], 0.87)}, title=name, prevalence=0.6
        ),
        "reliability": _charts.reliability({name: BINS, "other": BINS}, title=name),
        "decision_curve": _charts.decision_curve(
            [0.1, 0.5, 0.9], {name: [0.5, 0.4, 0.1], "treat_all": [0.5, 0.2, -4], "treat_none": [0, 0, 0]}, title=name
        ),
        "score_histogram": _charts.score_histogram([0.1, 0.2, 0.8, 0.9], [0, 1, 0, 1], threshold=0.5, title=name),
        "intervals": _charts.intervals([(name, *row[1:]) for row in ROWS], title=name),
        "bars": _charts.bars([name, "other"], {name: [1, None], "b": [2, -3]}, title=name, unit=name),
        "confusion": _charts.confusion(240, 29, 31, 351, title=name),
        "timeline": _charts.timeline([(name, 100.0, 160.5), ("next", 160.5, None)], title=name),
    }


def nothing(name: str = "ft") -> dict[str, Markup]:
    """One of each chart without anything to draw."""
    empty: list[float] = []
    return {
        "loss": _charts.learning_curves(dict.fromkeys(EPOCHS, empty), kind="loss", best_epoch=None, title=name),
        "roc": _charts.roc({name: (empty, empty, None)}, title=name),
        "no roc": _charts.roc({}, title=name),
        "precision_recall": _charts.precision_recall({name: (empty, empty, None)}, title=name, prevalence=None),
        "reliability": _charts.reliability({name: (empty,) * 5}, title=name),
        "decision_curve": _charts.decision_curve(empty, {name: empty}, title=name),
        "no decision_curve": _charts.decision_curve(empty, {}, title=name),
        "score_histogram": _charts.score_histogram(empty, empty, threshold=0.5, title=name),
        "intervals": _charts.intervals([(name, None, None, None, 0)], title=name),
        "no intervals": _charts.intervals([], title=name),
        "bars": _charts.bars([name], {name: [None]}, title=name, unit="s"),
        "no bars": _charts.bars([], {}, title=name, unit="s"),
        "confusion": _charts.confusion(0, 0, 0, 0, title=name),
        "timeline": _charts.timeline([], title=name),
    }


def odd() -> dict[str, Markup]:
    """Charts of what is rare: one point, equal values, zeros, enormous and unlimited figures."""
    one: dict[str, _charts.Numbers] = {
        "epoch": [1],
        "train_loss": [0.0],
        "val_loss": [0.0],
        "train_accuracy": [1.0],
        "val_accuracy": [1.0],
    }
    wild: dict[str, _charts.Numbers] = {
        "epoch": [1, 2, 3],
        "train_loss": [1.79e308, float("inf"), 2.0],
        "val_loss": [float("nan"), -1.0, 1e29],
    }
    equal = ([0.5], [0.5], [0.5], [0.5], [0])
    return {
        "one epoch": _charts.learning_curves(one, kind="loss", best_epoch=1, title="t"),
        "one accuracy": _charts.learning_curves(one, kind="accuracy", best_epoch=9, title="t"),
        "wild loss": _charts.learning_curves(wild, kind="loss", best_epoch=2, title="t"),
        "undefined point": _charts.roc({"a": ([0, 1], [0, 1], 0.5)}, title="t", points={"a": (float("nan"), 0.5)}),
        "one recall": _charts.precision_recall({"a": ([1], [1], 1)}, title="t", prevalence=1.0),
        "one bin": _charts.reliability({"a": equal}, title="t"),
        "one threshold": _charts.decision_curve([0.5], {"a": [0.0]}, title="t"),
        "equal scores": _charts.score_histogram([0.5] * 9, [1] * 9, threshold=0.5, title="t"),
        "ends": _charts.score_histogram([0.0, 1.0], [1, 0], threshold=-0.1, title="t"),
        "equal intervals": _charts.intervals([("a", 1.0, 1.0, 1.0, 0)], title="t", minimum=1.0),
        "zero intervals": _charts.intervals([("a", 0.0, 0.0, 0.0, 0)], title="t", maximum=None),
        "zero bars": _charts.bars(["a"], {"x": [0.0]}, title="t", unit="s"),
        "tiny bars": _charts.bars(["a"], {"x": [1e-300]}, title="t", unit="s"),
        "one moment": _charts.timeline([("a", 5.0, 5.0)], title="t"),
        "ages": _charts.timeline([("a", 0.0, 1e20), ("b", 7.0, 3.0)], title="t"),
        "no title": _charts.confusion(1, 0, 0, 1, title=""),
    }


def tree(svg: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def words(svg: Markup) -> list[str]:
    return [node.text or "" for node in tree(svg).iter("text")]


def told(svg: Markup) -> str:
    return tree(svg).findtext("desc") or ""


def paths(svg: Markup, colour: str) -> list[str]:
    """The lines of a series inside the axes."""
    return [node.get("d", "") for inner in tree(svg).iter("svg") for node in inner.findall("path")
            if inner.get("role") is None and node.get("stroke") == f"var(--{colour})"]  # fmt: skip


def points(path: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array([[float(one) for one in pair.split()] for pair in re.split("[ML]", path) if pair])


ALL = {f"{kind}: {name}": svg for kind, made in (("every", every()), ("none", nothing()), ("odd", odd()))
       for name, svg in made.items()}  # fmt: skip


@pytest.mark.parametrize("svg", ALL.values(), ids=ALL)
def test_every_chart_is_one_labelled_picture_that_scales(svg: Markup) -> None:
    root = tree(svg)
    assert isinstance(svg, Markup)
    assert (root.tag, root.get("class"), root.get("role")) == ("svg", "chart", "img")
    assert [child.tag for child in root][:2] == ["title", "desc"]
    assert len(told(svg)) > 10
    assert root.get("width") is None
    left, top, width, height = map(float, root.get("viewBox", "").split())
    assert (left, top, width) == (0, 0, 400)
    assert 20 < height < 700


@pytest.mark.parametrize("svg", ALL.values(), ids=ALL)
def test_no_attribute_is_undefined_and_colours_are_variables(svg: Markup) -> None:
    for node in tree(svg).iter():
        for name, value in node.attrib.items():
            assert not re.search(r"nan|inf|none\d|e[+-]?\d", value.lower().replace("none", "")), (name, value)
            if name in ("fill", "stroke"):
                assert re.fullmatch(r"none|var\(--(c[0-4]|ink|muted|grid|paper)\)", value), (name, value)
            assert name not in ("style", "id", "href", "onload")


@pytest.mark.parametrize("svg", ALL.values(), ids=ALL)
def test_what_is_drawn_lies_in_the_picture(svg: Markup) -> None:
    root = tree(svg)
    *_, width, height = map(float, root.get("viewBox", "").split())
    for node in root.iter("text"):
        assert 0 <= float(node.get("x", "")) <= width, node.text
        assert 0 < float(node.get("y", "")) <= height, node.text
    for node in root.iter("circle"):
        assert 0 <= float(node.get("cx", "")) <= width
        assert 0 <= float(node.get("cy", "")) <= height


@pytest.mark.parametrize("make", [every, nothing])
def test_hostile_names_are_shown_as_text_and_shortened(make: Callable[[str], dict[str, Markup]]) -> None:
    long = HOSTILE * 40
    for kind, svg in make(long).items():
        root = tree(svg)  # well-formed, so nothing broke out
        tags = {"svg", "title", "desc", "text", "path", "circle", "polygon"}
        assert {node.tag for node in root.iter()} <= tags, kind
        assert "<script" not in svg
        assert (root.findtext("title") or "").startswith("\"><script>alert('x')</script> =cmd()| & <b>"), kind
        for text in words(svg):
            assert text.isprintable()
            assert len(text) < 90, kind


def test_thousands_of_points_are_thinned_and_no_corner_moves_by_half_a_pixel() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random(20_000) < 0.5).astype(np.int8)
    scores = np.clip(0.5 + 0.15 * (labels - 0.5) + 0.2 * rng.standard_normal(20_000), 0, 1)
    curve = curves.roc_curve(labels, scores)
    assert len(curve.fpr) > 5_000
    svg = _charts.roc({"ft": (curve.fpr, curve.tpr, curve.auc)}, title="t")
    (path,) = paths(svg, "c0")
    drawn = points(path)
    assert len(drawn) <= 300
    inner = next(node for node in tree(svg).iter("svg") if node.get("role") is None)
    left, top, width, height = (float(one) for one in inner.get("viewBox", "").split())
    exact = np.column_stack(
        [left + 1.5 + curve.fpr * (width - 3), top + height - 1.5 - curve.tpr * (height - 3)]
    )  # the inner picture is 1.5 units wider than the axes on each side
    assert max(distances(exact, drawn)) * 640 / 400 < 0.5
    assert len(svg) < 12_000


def distances(
    exact: np.ndarray[tuple[int, int], np.dtype[np.float64]], drawn: np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> Iterator[float]:
    """How far each exact point lies from the drawn line."""
    start, chord = drawn[:-1], np.diff(drawn, axis=0)
    for point in exact:
        along = np.clip(((point - start) * chord).sum(axis=1) / np.maximum((chord**2).sum(axis=1), 1e-9), 0, 1)
        yield float(np.hypot(*(start + along[:, None] * chord - point).T).min())


def test_noise_without_end_still_gives_a_small_chart() -> None:
    rng = np.random.default_rng(0)
    epochs = {"epoch": np.arange(1, 5_001), "train_loss": rng.random(5_000), "val_loss": rng.random(5_000)}
    svg = _charts.learning_curves(epochs, kind="loss", best_epoch=7, title="t")
    assert len(svg) < 12_000
    assert svg.count("<circle") == 1  # in the legend


def test_an_undefined_point_breaks_the_line_and_a_lone_one_is_a_mark() -> None:
    (path,) = paths(every()["loss"], "c1")
    assert [len(points(f"M{piece}")) for piece in path.split("M") if piece] == [2]  # epochs 3 and 4
    squares = [node for node in tree(every()["loss"]).iter("polygon") if node.get("fill") == "var(--c1)"]
    assert len(squares) == 1 + 3  # the legend's, and epochs 1, 3 and 4


def test_series_differ_without_colour() -> None:
    curve = ([0.0, 0.3, 1.0], [0.0, 0.7, 1.0], 0.7)
    svg = _charts.roc({str(at): curve for at in range(7)}, title="t")
    lines = [(node.get("stroke"), node.get("stroke-dasharray")) for inner in tree(svg).iter("svg")
             for node in inner.findall("path") if inner.get("role") is None]  # fmt: skip
    assert len(set(lines)) == len(lines) == 1 + 7  # with the one of chance
    assert len({dash for _, dash in lines[1:6]}) == 5


def test_the_corner_is_enlarged_only_where_every_curve_is_in_it() -> None:
    good, middling, unknown = (([0, 0.1, 1], [0, 0.9, 1], auc) for auc in (0.97, 0.9, None))
    label = "The corner, enlarged"
    assert label in words(_charts.roc({"a": good}, title="t"))
    assert label not in words(_charts.roc({"a": good, "b": middling}, title="t"))
    assert label not in words(_charts.roc({"a": good, "b": unknown}, title="t"))


def test_operating_points_are_told_and_drawn_also_in_the_corner() -> None:
    svg = _charts.roc(
        {"ft": ([0, 0.1, 1], [0, 0.95, 1], 0.96)}, title="t", points={"ft": (0.1, 0.95), "other": (0.5, 1)}
    )
    circles = [node for node in tree(svg).iter("circle") if node.get("fill") == "var(--c0)"]
    squares = [node for node in tree(svg).iter("polygon") if node.get("fill") == "var(--c1)"]
    assert len(circles) == 3  # legend, curve, corner
    assert len(squares) == 2  # legend and curve: it lies outside the corner
    assert told(svg) == (
        "ROC curves: ft: AUC 0.9600; ft: sensitivity 0.950, specificity 0.900; "
        "other: sensitivity 1.000, specificity 0.500."
    )


def test_one_class_has_no_curve_and_says_why() -> None:
    one = curves.roc_curve(np.ones(4, dtype=np.int8), np.linspace(0.1, 0.9, 4))
    for svg in (
        _charts.roc({"a": (one.fpr, one.tpr, one.auc)}, title="t"),
        _charts.precision_recall({"a": (one.fpr, one.tpr, None)}, title="t", prevalence=1.0),
    ):
        assert "one of the two classes has no image" in told(svg)
        assert paths(svg, "c0") == []


def test_a_model_without_a_curve_stands_beside_one_that_has_one() -> None:
    svg = _charts.roc({"a": ([], [], None), "b": ([0, 0.2, 1], [0, 0.9, 1], 0.85)}, title="t")
    assert told(svg) == "ROC curves: a: AUC undefined; b: AUC 0.8500."
    assert paths(svg, "c0") == []
    assert len(paths(svg, "c1")) == 1


@pytest.mark.parametrize("first", [0, 1])  # with a point at recall 0, as scikit-learn gives, and without
@pytest.mark.parametrize("order", [1, -1])
def test_precision_recall_is_drawn_in_steps_so_that_its_area_is_the_average_precision(order: int, first: int) -> None:
    recall, precision = (
        np.array([0.0, 0.25, 0.5, 1.0])[first:][::order],
        np.array([1.0, 1.0, 0.8, 0.6])[first:][::order],
    )
    svg = _charts.precision_recall({"a": (recall, precision, 0.75)}, title="t", prevalence=0.5)
    (path,) = paths(svg, "c0")
    drawn = points(path)
    steps = np.diff(drawn, axis=0)
    assert np.all((steps == 0).any(axis=1))  # across or up, never aslant
    frame = next(node for node in tree(svg).iter("svg") if node.get("role") is None)
    _, top, width, height = (float(one) for one in frame.get("viewBox", "").split())
    # the axis reaches from 0.4 to 1
    heights = 1 - (drawn[:-1, 1] - top - 1.5) / (height - 3) * (1 - 0.4)
    area = float((steps[:, 0] / (width - 3) * heights).sum())
    assert area == pytest.approx(0.25 * 1 + 0.25 * 0.8 + 0.5 * 0.6, abs=0.01)


def test_reliability_marks_grow_with_images_and_missing_intervals_have_no_whisker() -> None:
    svg = _charts.reliability({"a": BINS}, title="t")
    radii = [float(node.get("r", "")) for node in tree(svg).iter("circle")][1:]
    assert radii[1] < radii[0] < radii[2]
    whiskers = [node for node in tree(svg).findall("path") if "V" in node.get("d", "")]
    assert len(whiskers) == 2
    assert told(svg) == "Reliability: a: the widest gap is where 0.10 was said and 0.00 was so."


def test_net_benefit_far_below_zero_is_cut_off_not_followed() -> None:
    svg = every()["decision_curve"]
    ticks = [float(text) for text in words(svg) if re.fullmatch(r"-?\d\.\d+", text)]
    assert min(ticks) >= -0.1
    assert "at 0.50 ft 0.400, treat_all 0.200, treat_none 0.000" in told(svg)


def test_the_histogram_mirrors_the_classes_and_counts_errors_above_the_threshold() -> None:
    svg = _charts.score_histogram([0.1, 0.5, 0.8, 0.9], [0, 1, 0, 1], threshold=0.5, title="t")
    assert told(svg) == (
        "Scores, PNEUMONIA above 0.500: PNEUMONIA: 2 images, 1 false negatives; NORMAL: 2 images, 1 false positives."
    )  # a score at the threshold is not above it
    up, down = (next(node.get("d", "") for node in tree(svg).iter("path") if node.get("fill") == f"var(--{colour})")
                for colour in ("c1", "c0"))  # fmt: skip
    zero = float(re.findall(r"M[\d.]+ ([\d.]+)V", up)[0])
    assert all(float(y) < zero for y in re.findall(r"V([\d.]+)H", up))
    assert all(float(y) > zero for y in re.findall(r"V([\d.]+)H", down))
    assert "Images" in words(svg)
    assert words(svg).count("1") == 2


def test_steep_counts_are_logarithmic_and_say_so() -> None:
    scores = np.concatenate([np.full(1_000, 0.99), np.full(3, 0.4)])
    svg = _charts.score_histogram(scores, np.ones(1_003, dtype=np.int64), threshold=None, title="t")
    assert "Images (logarithmic)" in words(svg)
    assert {"10", "100", "1,000"} <= set(words(svg))
    assert told(svg) == "Scores: PNEUMONIA: 1,003 images; NORMAL: 0 images."


def test_intervals_choose_a_scale_that_holds_every_figure() -> None:
    svg = _charts.intervals([("a", 1.4, 1.1, 1.9, 0), ("b", -0.2, -0.4, 0.0, 1)], title="t", minimum=0.5)
    xs = [float(one) for node in tree(svg).iter("path") if node.get("stroke", "").startswith("var(--c")
          for one in re.findall(r"[MH](-?[\d.]+)", node.get("d", ""))]  # fmt: skip
    assert len(xs) == 4
    assert all(20 <= x <= 378 for x in xs)
    assert told(svg) == "Figures with intervals: a: 1.400 (1.100 to 1.900); b: -0.200 (-0.400 to 0.000)."


def test_a_missing_interval_leaves_the_figure_and_a_missing_figure_its_row() -> None:
    svg = _charts.intervals(ROWS, title="t")
    assert (
        told(svg) == "Figures with intervals: AUC: 0.900 (0.850 to 0.950); Sensitivity: 0.800; Specificity: undefined."
    )
    assert "undefined" in words(svg)


def test_bars_name_their_series_and_go_both_ways_from_zero() -> None:
    svg = _charts.bars(["g", "h"], {"a": [2, None], "b": [4, -4]}, title="t", unit="ms")
    assert told(svg) == "In ms: g: a: 2; g: b: 4; h: a: undefined; h: b: -4."
    boxes = [re.findall(r"-?[\d.]+", node.get("d", "")) for node in tree(svg).iter("path")
             if node.get("fill", "").startswith("var(--c")]  # fmt: skip
    starts, widths = ([float(box[at]) for box in boxes] for at in (0, 2))
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert starts[3] + widths[3] == pytest.approx(starts[0], abs=0.2)
    assert widths[2] == 0


def test_the_confusion_names_errors_and_shades_by_the_share_of_the_row() -> None:
    svg = _charts.confusion(240, 29, 31, 351, title="t")
    shown = words(svg)
    assert {"false negatives (FN)", "false positives (FP)", "269 images that are NORMAL", "351"} <= set(shown)
    assert "8.1%, called NORMAL" in shown
    shades = [float(node.get("fill-opacity", "")) for node in tree(svg).iter("path") if node.get("fill-opacity")]
    assert shades == [
        pytest.approx(0.06 + 0.34 * share, abs=0.006) for share in (240 / 269, 29 / 269, 31 / 382, 351 / 382)
    ]


def test_a_class_without_images_has_no_share() -> None:
    assert "–, called NORMAL" in words(_charts.confusion(0, 0, 1, 3, title="t"))


@pytest.mark.parametrize(
    ("end", "unit", "shown"),
    [(30.0, "Seconds", "30.0 s"), (600.0, "Minutes", "0:10:00 h"), (9_000.0, "Hours", "2:30:00 h")],
)
def test_the_timeline_chooses_its_unit(end: float, unit: str, shown: str) -> None:
    svg = _charts.timeline([("train", 1_000.0, 1_000.0 + end), ("late", 1_001.0, None)], title="t")
    assert unit in words(svg)
    assert told(svg) == f"{shown} in all: train: {shown}; late: not ended."


def test_the_best_epoch_is_marked_only_where_it_was_drawn() -> None:
    assert "best epoch 3" in words(every()["loss"])
    assert told(every()["loss"]).endswith("the weights of epoch 3 were kept.")
    assert not any("best epoch" in text for text in words(odd()["one accuracy"]))


def test_ticks_are_round_numbers_within_the_limits() -> None:
    for low, high in ((0, 1), (0.83, 1), (-3, 7.2), (0, 3_871), (1e-6, 3e-6), (0, 1e29)):
        ticks = np.array(list(_charts._ticks(low, high, 6)))
        assert 2 <= len(ticks) <= 7
        assert low - 1e-9 <= ticks[0]
        assert ticks[-1] <= high * (1 + 1e-9)
        step = np.diff(ticks)[0]
        assert round(float(step / 10 ** np.floor(np.log10(step) + 1e-9)), 6) in (1, 2, 5)
    assert list(_charts._ticks(0.5, 3.5, 6, whole=True).values()) == ["1", "2", "3"]
    assert "-0.0" not in _charts._ticks(-0.3, 0.3, 6).values()


def test_long_names_keep_their_beginning_and_their_end() -> None:
    name = "person1_" + "x" * 300 + "_virus_7.jpeg"
    short = _charts._fit(name, 150)
    assert short.startswith("person1_")
    assert short.endswith("7.jpeg")
    assert _charts._span(short) <= 150
    assert _charts._fit("short", 150) == "short"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: _charts.learning_curves({"epoch": [1]}, kind="loss", best_epoch=None, title="t"),
         "The epochs lack train_loss, val_loss; pass the columns epoch, train_loss, val_loss."),
        (lambda: _charts.learning_curves(EPOCHS | {"epoch": [1]}, kind="loss", best_epoch=None, title="t"),
         "The columns of epochs differ in length: [1, 4]; pass equally long ones."),
        (lambda: _charts.roc({"ft": ([0, 1], [0], 0.5)}, title="t"),
         "The columns of ft differ in length: [1, 2]; pass equally long ones."),
        (lambda: _charts.bars(["a"], {"x": [1, 2]}, title="t", unit="s"),
         "The columns of x differ in length: [1, 2]; pass equally long ones."),
        (lambda: _charts.score_histogram([0.5, 1.5], [0, 2], threshold=None, title="t"),
         "Scores reach from 0.5 to 1.5 and labels from 0 to 2; pass scores in [0, 1] and labels that are 0 or 1."),
        (lambda: _charts.intervals([("a", "x", None, None, 0)], title="t"),  # type: ignore[list-item]
         NO_NUMBER),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(draw: Callable[[], Markup], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        draw()
    assert str(caught.value) == message
