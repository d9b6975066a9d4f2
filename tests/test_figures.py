from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps, pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pneumoscope import figures
from pneumoscope.errors import PneumoscopeError, UsageError
from pneumoscope.metrics import RocCurve
from pneumoscope.specs import RESEARCH_USE

COUNTS = {"NORMAL": 1341, "PNEUMONIA": 3875}
MATRIX = {"true_negatives": 250, "false_positives": 20, "false_negatives": 5, "true_positives": 1771}


def history(epochs: int = 12) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    columns = {
        "train_accuracy": 1 - 0.4 / epoch,
        "val_accuracy": 1 - 0.5 / epoch,
        "train_loss": 0.6 / epoch,
        "val_loss": 0.7 / epoch,
        "learning_rate": np.full(epochs, 1e-4),
    }
    return pd.DataFrame({"epoch": epoch, **columns})


def curve(auc: float | None = 0.98125) -> RocCurve:
    rates = np.linspace(0, 1, 50) if auc is not None else np.empty(0)
    return RocCurve(
        fpr=rates, tpr=rates**0.05, thresholds=rates[::-1], auc=auc, n_positive=1776, n_negative=270 if auc else 0
    )


def picture(height: int = 20, width: int = 24) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def grid(*, title: str, note: str = "") -> Figure:
    return figures.sample_grid([picture()] * 3, captions=["a.jpeg", "b.jpeg", "c.jpeg"], title=title, note=note)


def couples(*, title: str, note: str = "", n: int = 3) -> Figure:
    names = [(f"{at}a.jpeg", f"{at}b.jpeg") for at in range(n)]
    return figures.pairs([(picture(), picture(30, 20))] * n, captions=names, title=title, note=note)


def panel(*, title: str, note: str = "", n: int = 1) -> Figure:
    red = np.full((20, 24, 3), (200, 60, 60), dtype=np.uint8)
    layers = [figures.Layer(red, 2.5 * at, f"Map {at}", f"Unit {at}") for at in range(1, n + 1)]
    return figures.evidence_panel(picture(), layers, title=title, said=["Score 0.9", "$Reason$"], aspect=1.5, note=note)


DRAWINGS: dict[str, Callable[..., Figure]] = {
    "accuracy_curve": lambda **options: figures.accuracy_curve(history(), best_epoch=7, **options),
    "loss_curve": lambda **options: figures.loss_curve(history(), best_epoch=7, **options),
    "roc_curve": lambda **options: figures.roc_curve(curve(), point=(0.05, 0.91, "youden"), **options),
    "confusion_matrix": lambda **options: figures.confusion_matrix(MATRIX, **options),
    "class_bars": lambda **options: figures.class_bars(COUNTS, **options),
    "class_pie": lambda **options: figures.class_pie(COUNTS, **options),
    "sample_grid": grid,
    "pairs": couples,
    "evidence_panel": panel,
}
WITHOUT_AXES = ("sample_grid", "pairs", "evidence_panel")
every_drawing = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@every_drawing
def test_every_figure_says_its_note_and_research_use_in_small_grey_type(draw: Callable[..., Figure]) -> None:
    figure = draw(title="cnn", note="SYNTHETIC DATA")
    own = f"{figures.SIGNED} · " if draw is panel else ""
    assert figure.get_supxlabel().replace("\n", " ") == f"{own}SYNTHETIC DATA · {RESEARCH_USE}"
    assert draw(title="cnn").get_supxlabel().replace("\n", " ") == f"{own}Research use only, not a medical device"


@every_drawing
def test_nothing_is_cut_off_also_under_a_long_title_and_note(draw: Callable[..., Figure]) -> None:
    figure = draw(title="a rather long title " * 6, note="a long note about where this comes from, " * 4)
    pixels = np.asarray(Image.open(io.BytesIO(png_of(figure))).convert("L"))
    rim = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert (rim == 255).all()
    assert (pixels < 255).any()


@every_drawing
def test_titles_are_drawn_as_they_are_and_never_as_formulas(draw: Callable[..., Figure]) -> None:
    figure = draw(title="$x$ <b> \udcff\n日", note="$\\frac$")
    png_of(figure)  # a formula would raise, a missing glyph would warn
    assert any(text.startswith(r"\$x\$ <b>") for text in texts(figure))


@every_drawing
def test_no_pyplot_figure_is_opened_and_the_figure_shows_itself_in_a_notebook(draw: Callable[..., Figure]) -> None:
    before = pyplot.get_fignums()
    figure = draw(title="cnn")
    assert pyplot.get_fignums() == before
    shown: Any = figure
    assert Image.open(io.BytesIO(shown._repr_png_())).format == "PNG"


@pytest.mark.parametrize("name", [name for name in DRAWINGS if name not in WITHOUT_AXES])
def test_draws_into_given_axes_and_returns_their_figure(name: str) -> None:
    figure = Figure(figsize=(10, 5))
    left, right = figure.subplots(1, 2)
    assert DRAWINGS[name](title="one", note="A", ax=left) is figure
    assert DRAWINGS[name](title="two", note="B", ax=right) is figure
    assert [left.get_title("left"), right.get_title("left")] == ["one", "two"]
    assert figure.get_supxlabel() == f"A · B · {RESEARCH_USE}"


def test_axes_without_a_figure_are_refused() -> None:
    ax = Figure().subplots()
    ax.remove()
    with pytest.raises(UsageError, match="The axes belong to no figure any more; pass axes of a live figure, or none"):
        figures.class_bars(COUNTS, title="x", ax=ax)


def test_learning_curves_show_both_lines_whole_epochs_and_the_best_one() -> None:
    figure = figures.accuracy_curve(history(12), title="cnn", best_epoch=7)
    ax = figure.axes[0]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), history(12)["train_accuracy"])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), history(12)["val_accuracy"])
    assert set(np.asarray(ax.lines[2].get_xdata()).tolist()) == {7}
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training", "validation", "best epoch (7)"]
    ticks = ax.get_xticks()
    assert (ticks == np.round(ticks)).all()
    assert len(ticks) <= 14
    assert 1.0 <= ax.get_ylim()[1] <= 1.02


def test_one_epoch_is_a_visible_point_with_one_tick() -> None:
    ax = figures.loss_curve(history(1), title="cnn").axes[0]
    assert all(line.get_markersize() > 0 and line.get_marker() != "None" for line in ax.lines)
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]
    assert ax.get_ylim()[0] == 0


def test_a_loss_that_ran_away_leaves_a_gap_and_the_history_unchanged() -> None:
    table = history(3)
    table.loc[1, "val_loss"] = np.inf
    ax = figures.loss_curve(table, title="cnn").axes[0]
    assert np.isnan(np.asarray(ax.lines[1].get_ydata(), dtype=float)[1])
    assert np.isinf(table["val_loss"].to_numpy()[1])
    assert np.isfinite(ax.get_ylim()).all()


def test_a_history_without_its_columns_or_epochs_is_refused() -> None:
    with pytest.raises(UsageError, match="The history lacks the column val_loss; pass one row per epoch with the"):
        figures.loss_curve(history().drop(columns="val_loss"), title="cnn")
    with pytest.raises(UsageError, match="The history holds no epoch; pass one row per epoch with the columns epoch"):
        figures.accuracy_curve(history().iloc[:0], title="cnn")


def test_roc_legend_names_the_area_the_counts_and_the_operating_point() -> None:
    figure = figures.roc_curve(curve(), title="tl", point=(0.05, 0.91, "youden"))
    joined = "\n".join(texts(figure))
    assert "AUC = 0.9812" in joined
    assert "1,776 PNEUMONIA, 270 NORMAL" in joined
    assert "youden\n(sensitivity 0.910, specificity 0.950)" in joined
    ax = figure.axes[0]
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)


def test_an_undefined_area_is_called_undefined() -> None:
    joined = "\n".join(texts(figures.roc_curve(curve(None), title="tl")))
    assert "AUC undefined\n(1,776 PNEUMONIA, 0 NORMAL)" in joined


def test_confusion_matrix_writes_counts_and_shares_of_the_true_class() -> None:
    found = texts(figures.confusion_matrix(MATRIX, title="cnn"))
    for wanted in ("250", "20", "5", "1,771", "92.6% of 270", "0.3% of 1,776", "false negatives"):
        assert wanted in found
    none_sick = figures.confusion_matrix(MATRIX | {"false_negatives": 0, "true_positives": 0}, title="cnn")
    assert texts(none_sick).count("no such images") == 2


def test_confusion_matrix_refuses_missing_counts() -> None:
    with pytest.raises(UsageError, match="lacks false_negatives, true_positives; pass all four counts by these names"):
        figures.confusion_matrix({"true_negatives": 1, "false_positives": 2}, title="cnn")


def test_sample_grid_shows_the_pixels_as_they_are_and_shortens_captions_in_the_middle() -> None:
    long = "person1_" + "x" * 80 + "_virus_7.jpeg"
    figure = figures.sample_grid([picture(20, 24), picture(30, 10)], captions=["a$b$.jpeg", long], title="t")
    assert len(figure.axes) == 12
    shown = figure.axes[0].images[0]
    np.testing.assert_array_equal(shown.get_array(), picture(20, 24))
    assert shown.get_clim() == (0, 255)
    assert shown.get_cmap() == colormaps["gray"]
    assert figure.axes[0].get_title() == r"a\$b\$.jpeg"
    caption = figure.axes[1].get_title()
    assert len(caption) == 32
    assert caption.startswith("person1_xxx")
    assert caption.endswith("_virus_7.jpeg")
    assert not figure.axes[2].images


def test_an_empty_sample_grid_says_so() -> None:
    assert "no images" in texts(figures.sample_grid([], captions=[], title="t"))


def test_sample_grid_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="got 2 images and 1 captions for 3 x 4 cells; pass one caption for each"):
        figures.sample_grid([picture()] * 2, captions=["a"], title="t")
    with pytest.raises(UsageError, match="got 3 images and 3 captions for 1 x 2 cells"):
        figures.sample_grid([picture()] * 3, captions=["a"] * 3, title="t", rows=1, columns=2)


def test_pairs_stand_side_by_side_two_in_a_row_each_image_under_its_caption() -> None:
    shown = [ax for ax in couples(title="t").axes if ax.images]
    assert [ax.get_title() for ax in shown] == ["0a.jpeg", "0b.jpeg", "1a.jpeg", "1b.jpeg", "2a.jpeg", "2b.jpeg"]
    places = [(spec.rowspan.start, spec.colspan.start) for ax in shown if (spec := ax.get_subplotspec())]
    assert places == [(0, 0), (0, 1), (0, 3), (0, 4), (1, 0), (1, 1)]
    for ax, wanted in zip(shown, [picture(), picture(30, 20)] * 3, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), wanted)
        assert ax.images[0].get_clim() == (0, 255)


def test_no_pairs_are_called_so_and_too_many_are_refused() -> None:
    assert "no pairs" in texts(couples(title="t", n=0))
    assert len([ax for ax in couples(title="t", n=12).axes if ax.images]) == 24
    with pytest.raises(
        UsageError, match="got 13 pairs and 13 captions; pass one pair of captions for each and no more"
    ):
        couples(title="t", n=13)
    with pytest.raises(UsageError, match="got 1 pairs and 0 captions"):
        figures.pairs([(picture(), picture())], captions=[], title="t")


def test_an_evidence_panel_shows_the_image_its_maps_and_bars_of_a_given_scale() -> None:
    figure = panel(title="a$b$.jpeg", n=2)
    png_of(figure)
    shown = [ax for ax in figure.axes if ax.images]
    np.testing.assert_array_equal(shown[0].images[0].get_array(), picture())
    assert shown[0].images[0].get_clim() == (0, 255)
    assert [ax.get_title() for ax in shown] == ["What the model was shown (24 x 20)", "Map 1", "Map 2"]
    assert figure.get_suptitle() == "a\\$b\\$.jpeg\nScore 0.9\n\\$Reason\\$"
    bars = [bar for ax in shown[1:] for bar in ax.child_axes]
    assert [bar.get_ylim() for bar in bars] == [(-2.5, 2.5), (-5.0, 5.0)]
    assert [bar.get_ylabel() for bar in bars] == ["Unit 1", "Unit 2"]
    for ax in shown:  # the shape of the file, not of the square that the model takes
        box = ax.get_window_extent()
        assert box.height / box.width == pytest.approx(1.5, rel=0.01)


def test_the_bar_of_a_panel_has_the_colours_of_the_overlay_blue_to_red() -> None:
    bar = panel(title="t").axes[1].child_axes[0]
    colours = np.asarray(bar.collections[-1].get_cmap()(np.array([0.0, 0.5, 1.0])))[:, :3] * 255
    blue, grey, red = colours
    np.testing.assert_allclose(blue, 128 * 0.35 + 0.65 * np.array([33, 102, 172]), atol=1)
    np.testing.assert_allclose(grey, 128, atol=2)
    np.testing.assert_allclose(red, 128 * 0.35 + 0.65 * np.array([178, 24, 43]), atol=1)


def test_bars_and_pie_write_counts_percentages_and_the_total() -> None:
    bars = texts(figures.class_bars(COUNTS, title="t"))
    assert {"1,341", "3,875", "NORMAL", "PNEUMONIA", "Images (5,216 in total)"} <= set(bars)
    pie = texts(figures.class_pie(COUNTS, title="t"))
    assert {"NORMAL\n1,341 (25.7%)", "PNEUMONIA\n3,875 (74.3%)", "5,216 images in total"} <= set(pie)


def test_a_class_without_images_is_named_not_hidden() -> None:
    assert "13 images in total · PNEUMONIA: 0" in texts(figures.class_pie({"NORMAL": 13, "PNEUMONIA": 0}, title="t"))
    assert "0 images in total · NORMAL: 0" in texts(figures.class_pie({"NORMAL": 0}, title="t"))
    assert {"0", "13"} <= set(texts(figures.class_bars({"NORMAL": 13, "PNEUMONIA": 0}, title="t")))


def test_classes_keep_their_colours_whatever_the_order() -> None:
    straight = figures.class_bars(COUNTS, title="t").axes[0].patches
    turned = figures.class_bars(dict(reversed(COUNTS.items())), title="t").axes[0].patches
    assert [bar.get_facecolor() for bar in straight] == [bar.get_facecolor() for bar in turned][::-1]


@every_drawing
def test_saved_files_are_png_at_150_dpi_and_equal_for_equal_figures(
    draw: Callable[..., Figure], tmp_path: Path
) -> None:
    first, second = tmp_path / "new" / "a.png", tmp_path / "b.png"
    figures.save(draw(title="cnn"), first)
    figures.save(draw(title="cnn"), second)
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert set(image.info) == {"dpi"}
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.png", "b.png"]


def test_saving_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PneumoscopeError, match=r"Cannot write .*a\.png"):
        figures.save(grid(title="t"), tmp_path / "file" / "a.png")
