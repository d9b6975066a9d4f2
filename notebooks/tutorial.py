# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Pneumonia on chest X-rays, three ways
#
# This page goes from a folder of chest X-rays to three trained classifiers and an honest look at how good they are:
#
# 1. **cnn**: a small convolutional network trained from scratch;
# 2. **tl**, transfer learning: a large network trained on ImageNet, frozen, with a new head;
# 3. **ft**, fine-tuning: the same, and the last layers of the large network train too.
#
# It is one text. Read and run it as a notebook (`jupytext --to notebook tutorial.py`, or open it in Jupyter with the
# jupytext extension), or run it as a script (`python tutorial.py`), which is also how a batch job runs it:
#
#     PNEUMOSCOPE_DATA=/path/to/chest_xray srun --cpus-per-task 8 python tutorial.py
#
# Without `PNEUMOSCOPE_DATA` it draws synthetic X-rays, so that everything can be tried without downloading anything.
# **Scores on synthetic images say nothing about real ones.** Nothing here is a medical device.

# %%
import os
from pathlib import Path

from pneumoscope import (
    Catalog,
    ImageStore,
    Spec,
    build,
    choose_operating_points,
    evaluate,
    figures,
    phantom,
    score,
    train,
)

OUT = Path(os.environ.get("PNEUMOSCOPE_OUT", "tutorial-output"))
real = os.environ.get("PNEUMOSCOPE_DATA")
data = Path(real) if real else phantom.write_dataset(OUT / "synthetic-images")
spec = Spec.preset_named("default" if real else "demo")
note = "" if real else "SYNTHETIC DATA"

# %% [markdown]
# ## The images
#
# `Catalog.scan` lists every image with its label, its size and its *group*: the patient, as far as the file name tells.
# In the Kaggle set, `person12_virus_34.jpeg` belongs to the group `virus/12`; the same number in another series is
# another child.

# %%
catalog = Catalog.scan(data)
for sentence in catalog.notes:
    print(sentence)
catalog.table.head()

# %% [markdown]
# Some images are kept apart to steer the training (*validation*), others are not looked at until the end (*test*). All
# images of one child go to the same side: a network recognises a child it has seen, and would be praised for it.

# %%
catalog = catalog.split(spec.split, seed=spec.seed)
catalog.counts()

# %%
counts = {label: int(catalog.counts()[label].drop("test").sum()) for label in ("NORMAL", "PNEUMONIA")}
figures.class_bars(counts, title="Training and validation images", note=note)

# %% [markdown]
# `ImageStore.pack` decodes and resizes every image once. Every epoch after that reads pixels from one memory-mapped
# file.

# %%
store = ImageStore.pack(catalog, size_px=spec.image.size_px)
catalog = catalog.quarantine(store.rejected)
sick = catalog.rows("train", label=1).head(12)
figures.sample_grid(
    [store.images[row] for row in store.rows_of(sick)],
    captions=[Path(path).name for path in sick["path"]],
    title="PNEUMONIA",
    note=note,
)

# %% [markdown]
# ## Training
#
# Each approach is a Keras model. The frozen part of `tl` and `ft` gives the same output in every epoch, so it is
# computed once per image and kept; an epoch then costs only the part that trains.
#
# Watch `val_loss`: when it has not fallen for five epochs, training stops and the best epoch's weights are taken.

# %%
models, histories = {}, {}
for approach in spec.models:
    models[approach] = build(approach, spec)
    histories[approach] = train(models[approach], store, catalog, spec=spec)
    last = histories[approach].epochs.iloc[-1]
    print(f"{approach}: best epoch {histories[approach].best_epoch}, last val_accuracy {last.val_accuracy:.3f}")

# %%
for approach, history in histories.items():
    figure = figures.loss_curve(history.epochs, title=approach, note=note, best_epoch=history.best_epoch)
    figures.save(figure, OUT / f"{approach}_learning_curve_loss.png")
figure

# %% [markdown]
# ## How good are they?
#
# A **false negative** is a sick child called NORMAL, a **false positive** a healthy one called PNEUMONIA. Where the
# line lies between them is a choice: the threshold. 0.5 is a habit. Here a better one is chosen on the validation
# images (Youden's: the greatest sum of sensitivity and specificity) and carried to the test images unchanged.
#
# The validation score flatters: early stopping has chosen the epoch that looks best on exactly these images, and the
# threshold too. The test score is the one to report.

# %%
for approach, model in models.items():
    on_validation = score(model, store, catalog.rows("validation"))
    points = choose_operating_points(on_validation)
    on_test = score(model, store, catalog.rows("test"))
    for name, predictions in (("validation", on_validation), ("test", on_test)):
        result = evaluate(predictions, operating_points=points)
        at = result.operating_points["youden"]
        print(
            f"{approach:>3} {name:>10}: n {result.n}, AUC {result.roc.auc:.3f}, "
            f"at 0.5: {result.at_half.false_negatives} FN, {result.at_half.false_positives} FP; "
            f"at {at.threshold:.2f}: {at.false_negatives} FN, {at.false_positives} FP"
        )
    figures.save(
        figures.roc_curve(result.roc, title=f"{approach}: ROC, test images", note=note),
        OUT / f"{approach}_roc_curve_testing.png",
    )

# %% [markdown]
# The last curve, shown here:

# %%
figures.roc_curve(result.roc, title=f"{approach}: ROC, test images", note=note)

# %% [markdown]
# ## What next
#
# `pneumoscope run DATA -o RUN` does all of this in one command and keeps every curve and score as CSV beside the
# pictures. `pneumoscope models --model ft` lists every layer. `--preset tutorial` is the published procedure:
# ResNet152V2, a split by image, 50 epochs.
