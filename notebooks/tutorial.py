# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pneumonia on chest X-rays, three ways
#
# From a folder of chest X-rays to three trained classifiers, and an honest look at how good they are. You need no
# experience with deep learning; you should have met Python. The three approaches:
#
# | | in a sentence |
# |---|---|
# | `cnn` | a small network that learns from these X-rays alone |
# | `tl`, transfer learning | a large network that learned to see from photographs, and a new last part that learns |
# | `ft`, fine-tuning | the same, and the large network's last layers learn too |
#
# As it stands, the page draws **synthetic** X-rays, so that everything can be tried at once without a download.
# Scores on synthetic images say nothing about real ones. **For your own images change one line: `DATA` in the next
# cell.**
#
# Research use only, not a medical device.

# %%
from pathlib import Path

DATA = None  # your images, for example Path("/data/chest_xray")
OUT = Path("tutorial-output")  # where pictures and the run at the end go

# %%
import pandas as pd
from IPython.display import display

from pneumoscope import (
    Catalog,
    ImageStore,
    Spec,
    audit_images,
    build,
    choose_operating_points,
    compare_all,
    evaluate,
    figures,
    phantom,
    run,
    score,
    train,
)

if DATA:
    data, note = Path(DATA), ""
    spec = Spec.preset_named("default")
else:  # few and small images, so that the page takes minutes
    data, note = phantom.write_dataset(OUT / "synthetic-images", n_train=300, n_test=100), "SYNTHETIC DATA"
    spec = Spec.preset_named("demo").with_overrides(["image.size_px=96", "train.epochs=6"])
print(spec.to_toml().partition("[cluster]")[0])

# %% [markdown]
# That is the **Spec**: every setting of what follows. It is fixed from here on, so that what is written down is what
# was done.
#
# ## The images
#
# `Catalog.scan` lists every image with its label, its size and its **group**: the patient, as far as the file name
# tells. In the Kaggle set `person12_virus_34.jpeg` belongs to the group `virus/12`; the number 12 of another series is
# another child.

# %%
catalog = Catalog.scan(data)
for sentence in catalog.notes:
    print(sentence)
catalog.table[["path", "label", "group", "subtype", "width_px", "height_px"]].head()

# %% [markdown]
# Now the images are divided. Each part has one job:
#
# | part | what it is for | who has seen it |
# |---|---|---|
# | *train* | the networks learn from it | the networks |
# | *validation* | decides when to stop learning | the choice of the epoch |
# | *calibration* | decides where the line between the calls lies | the choice of the threshold |
# | *test* | says how good it all is | nobody, until the end |
#
# **Pitfall 1: the same child on both sides.** Two X-rays of one child are alike. A network that has seen one recognises
# the other, and is praised for memory. So all images of a child go to the same part.

# %%
catalog = catalog.split(spec.split, seed=spec.seed)
catalog.counts()

# %%
counts = catalog.counts()
for part in ("train", "test"):
    figure = figures.class_bars({label: int(counts.at[part, label]) for label in ("NORMAL", "PNEUMONIA")},
                                title=f"Images for {part}", note=note)  # fmt: skip
    figures.save(figure, OUT / f"{part}_classes.png")
figure

# %% [markdown]
# **Pitfall 2: accuracy.** There are far more PNEUMONIA images than NORMAL ones. Who calls every image PNEUMONIA is
# right about that often and has understood nothing. Remember this share: an accuracy means something only beside it.

# %%
share = counts["PNEUMONIA"] / counts["total"]
print("Accuracy of calling everything PNEUMONIA:", share.round(3).to_dict())

# %% [markdown]
# `ImageStore.pack` decodes every image once, squeezes it into a square and keeps it. Every epoch after that only reads.

# %%
store = ImageStore.pack(catalog, size_px=spec.image.size_px, jpeg_quality=spec.image.jpeg_quality)
catalog = catalog.quarantine(store.rejected)  # what could not be decoded is set apart, and listed
for label, name in enumerate(("NORMAL", "PNEUMONIA")):
    some = catalog.rows("train", label=label).head(12)
    figure = figures.sample_grid(
        list(store.images[store.rows_of(some)]),
        captions=[Path(path).name for path in some["path"]],
        title=f"{name}, training images",
        note=note,
    )
    figures.save(figure, OUT / f"samples_{name.lower()}.png")
    display(figure)

# %% [markdown]
# **Pitfall 3: the data themselves.** The same image in train and test, one image under both labels, pictures that stand
# on their side: all of it makes figures that are wrong. The audit looks for that before anything is trained. An
# *error* stops a run, a *warning* wants your eyes, a *note* is good to know.

# %%
for finding in audit_images(data, None, spec=spec).findings:
    print(f"{finding.severity:>7}  {finding.name}: {finding.sentence}")

# %% [markdown]
# ## Training
#
# In an **epoch** the network sees every training image once, in small batches, and after each batch its weights move a
# little so that the *loss* falls. The loss counts how wrong the scores are, and more so where a wrong score was sure of
# itself.
#
# After each epoch the validation images are scored. When `val_loss` has not fallen for five epochs, the training ends,
# and the weights of the best epoch are taken.
#
# The frozen part of `tl` and `ft` gives the same numbers for an image in every epoch, so it is computed once and kept.

# %%
models, histories = {}, {}
for approach in spec.models:
    models[approach] = build(approach, spec)
    histories[approach] = train(models[approach], store, catalog, spec=spec)
    kept = histories[approach].epochs.iloc[histories[approach].best_epoch - 1]
    print(
        f"{approach:>4}: best epoch {histories[approach].best_epoch} of {len(histories[approach].epochs)}, "
        f"val_loss {kept.val_loss:.3f}, val_accuracy {kept.val_accuracy:.3f}"
    )

# %% [markdown]
# How to read a **learning curve**:
#
# - both lines fall: it learns, and what it learns holds for images that it has not seen;
# - the training line falls and the validation line rises: it learns the training images by heart (*overfitting*). The
#   dotted line marks the epoch that was kept, before that went far;
# - both stay high: it learns nothing; more epochs or a greater learning rate may help;
# - the validation line jumps: the validation images are few. Do not read meaning into single points.
#
# An accuracy that stands still at the share from pitfall 2 belongs to a network that calls everything PNEUMONIA.

# %%
for approach, history in histories.items():
    for quantity, draw in (("loss", figures.loss_curve), ("accuracy", figures.accuracy_curve)):
        figure = draw(history.epochs, title=f"{approach}: {quantity}", note=note, best_epoch=history.best_epoch)
        figures.save(figure, OUT / f"{approach}_learning_curve_{quantity}.png")
        if quantity == "loss":
            display(figure)

# %% [markdown]
# ## Where to draw the line
#
# A network gives each image a **score** between 0 and 1. It becomes a call at a **threshold**: PNEUMONIA where the
# score lies above it. There are two ways to be wrong:
#
# - a **false negative** (FN): a sick child called NORMAL;
# - a **false positive** (FP): a healthy child called PNEUMONIA.
#
# *Sensitivity* is the share of the sick that are found, *specificity* the share of the healthy that are left alone. A
# lower threshold buys the one with the other. 0.5 is a habit, not a choice. An **operating point** is a threshold
# that was chosen, for a stated reason:
#
# | | |
# |---|---|
# | `youden` | the greatest sum of sensitivity and specificity |
# | `sensitivity-0.95` | the highest threshold that still finds 95 % of the sick |
# | `cost` | the cost is least, where a false negative counts as five false positives |
#
# It is chosen on images that nothing else was chosen on, and **never on test**. On few images it may come out
# strange: a `cost` below 0 says that to call everything PNEUMONIA was cheapest.

# %%
chosen_on = "calibration" if len(catalog.rows("calibration")) else "validation"
points, scored = {}, {}
for approach, model in models.items():
    scored[approach] = {part: score(model, store, catalog.rows(part)) for part in ("validation", chosen_on)}
    points[approach] = choose_operating_points(scored[approach][chosen_on])
pd.DataFrame(points).T.round(3).rename_axis(f"thresholds chosen on {chosen_on}")

# %% [markdown]
# ## The test images, once
#
# Everything is decided, so now we may look. To look, change something and look again is to choose on test: after some
# rounds the figures are no longer true of new images. (`pneumoscope run` counts in a ledger how often a test set was
# looked at.)

# %%
rows, results = [], {}
for approach, model in models.items():
    scored[approach]["test"] = score(model, store, catalog.rows("test"))
    for part in ("validation", "test"):
        predictions = scored[approach][part]
        result = evaluate(predictions, operating_points=points[approach])
        results[approach, part] = result
        at = next(iter(result.operating_points.values()))
        low_high = result.auc.interval if result.auc else None
        rows.append(
            {
                "model": approach,
                "part": part,
                "n": result.n,
                "AUC": result.roc.auc,
                "95 % interval": f"{low_high.low:.3f} to {low_high.high:.3f}" if low_high else "–",
                "accuracy at 0.5": result.at_half.accuracy,
                "FN at 0.5": result.at_half.false_negatives,
                "FP at 0.5": result.at_half.false_positives,
                "threshold": at.threshold,
                "sensitivity": at.sensitivity,
                "specificity": at.specificity,
                "FN": at.false_negatives,
                "FP": at.false_positives,
            }
        )
table = pd.DataFrame(rows).set_index(["model", "part"]).round(3)
print(table[["n", "AUC", "FN at 0.5", "FP at 0.5"]].to_string())
table

# %% [markdown]
# **Pitfall 4: the validation figure flatters.** The epoch was chosen because it looked best on exactly these images. A
# figure that was chosen for being high is on average higher than the truth. So the test figure is the one to report,
# and a fall from validation to test is nothing to wonder at. It may also rise, by luck: the intervals say how far luck
# goes. On real data there is one more reason to move: the test children may come from another time or another machine.
#
# **Pitfall 5: a figure without its interval.** With a hundred test images a sensitivity is known to within some points
# only. The interval says which true values go together with what was seen.
#
# The **ROC curve** shows every threshold at once: to the right the healthy called sick, upwards the sick found. The
# diagonal is guessing, the upper left corner is perfect. The AUC is the area below: how often a sick child has a
# higher score than a healthy one. The mark is the operating point.

# %%
for approach in models:
    for part, shown in (("validation", "validation"), ("test", "testing")):
        result = results[approach, part]
        name, at = next(iter(result.operating_points.items()))
        figure = figures.roc_curve(
            result.roc,
            title=f"{approach}: ROC, {shown} images",
            note=note,
            point=(1 - at.specificity, at.sensitivity, name),
        )
        figures.save(figure, OUT / f"{approach}_roc_curve_{shown}.png")
    display(figure)

# %%
for approach in models:
    at = next(iter(results[approach, "test"].operating_points.values()))
    counted = {
        key: getattr(at, key) for key in ("true_negatives", "false_positives", "false_negatives", "true_positives")
    }
    figure = figures.confusion_matrix(
        counted, title=f"{approach}: calls on test, threshold {at.threshold:.2f}", note=note
    )
    figures.save(figure, OUT / f"{approach}_confusion_testing.png")
figure

# %% [markdown]
# ## Which approach is best?
#
# **Pitfall 6: the highest figure wins.** All models were scored on the same images, so they are compared image by
# image, and patients are resampled whole. One is called *better* only where chance is no good explanation; else the
# verdict is that they *cannot be told apart* with so many images. That does not mean that they are equally good.

# %%
on_test = {approach: scored[approach]["test"] for approach in models}
for comparison in compare_all(
    on_test,
    groups=catalog.rows("test")["group"],
    thresholds={approach: next(iter(points[approach].values())) for approach in models},
    seed=spec.seed,
):
    print(comparison.sentence)

# %% [markdown]
# ## What did the model use?
#
# An **evidence map** divides the score among the places of the image: red speaks for PNEUMONIA, blue for NORMAL. Here
# it is exact: all cells and one number that belongs to no place (the *bias*) add up to the logit, which is the score
# before it is bent into 0 to 1. The next cell checks that.
#
# **Pitfall 7: a map is no diagnosis.** It shows what the *model* used, which need not be where the illness is. Its
# cells are coarse. A red lung does not prove that the model is right, but red in the border, on a letter or outside
# the body is a reason to distrust it. `pneumoscope explain RUN -o DIR` tests whether a model's maps can be believed.

# %%
from pneumoscope import evidence, evidence_figures, explainer
from pneumoscope.inference import network_of
from pneumoscope.specs import LABELS

chosen = max(models, key=lambda approach: results[approach, "validation"].roc.auc)  # without the test images
some = pd.concat([catalog.rows("test", label=label).head(3) for label in (1, 0)])
pixels = store.images[store.rows_of(some)]
outputs = network_of(models[chosen])(pixels)
added = outputs.evidence.sum(axis=(1, 2)) + outputs.bias
print(f"{chosen}: sum of the map + bias is off the logit by at most {abs(added - outputs.logit).max():.1e}")

scale = float(abs(outputs.evidence).max()) or 1.0  # one scale for all, so that strong looks strong
grid = explainer.grid(models[chosen])
threshold = next(iter(points[chosen].values()))
figure = evidence_figures.gallery(
    list(pixels),
    [
        evidence.overlay(image, cells, grid=grid, scale=scale)
        for image, cells in zip(pixels, outputs.evidence, strict=True)
    ],
    captions=[
        f"is {LABELS[label]}, called {LABELS[int(value > threshold)]} ({value:.2f})"
        for label, value in zip(some["label"], outputs.score, strict=True)
    ],
    scale=scale,
    title=f"{chosen}: evidence on test images",
    note=note,
)
figures.save(figure, OUT / f"{chosen}_evidence.png")
figure

# %% [markdown]
# ## The whole job in one call
#
# `run` does all of the above and more, and leaves a directory that holds everything: settings, models, scores, tables,
# figures, `metrics.json`, and `report.html`, one file that opens in any browser without a network. It also asks what a
# model would reach that sees no lung at all, whether the test images differ from the training images, and whether
# probabilities can be taken at their word.
#
# Here with the two approaches whose frozen part is stored already; take `with_overrides` away for all of them.

# %%
from pneumoscope.report import write_report

whole = run(spec.with_overrides(['models=["tl", "ft"]']), data, OUT / "run", resume=True)
print(f"{whole.folder} is {whole.status}. Open its report: {write_report(whole)}")

# %% [markdown]
# ## What next
#
# - The same on the command line: `pneumoscope run DATA -o RUN`.
# - One setting changed: `spec.with_overrides(["train.epochs=3"])`. All of them are listed under *The command line* in
#   the documentation.
# - The published procedure (ResNet152V2, split by image, 50 epochs): `Spec.preset_named("tutorial")`. It cuts
#   patients between train and validation, and says so.
# - Ask the model about a file: `pneumoscope predict scans --model tutorial-output/run --evidence maps`.
