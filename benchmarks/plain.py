"""The peer: the plain Keras procedure, as a careful tutorial writes it, with nothing of pneumoscope in it.

A folder loader that decodes every file in every epoch, maps, `fit` through the whole network, `predict` image by image.
The loader and the maps run in parallel and ahead of the training, as Keras's own documentation advises.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

SIZE, BATCH, SEED = 224, 32, 42


def listed(folder: Path, *, size: int = SIZE) -> tuple[Any, Any]:
    """Return Keras's own training and validation part of class folders."""
    with contextlib.redirect_stdout(io.StringIO()):  # it counts the files aloud, verbose or not
        return keras.utils.image_dataset_from_directory(
            folder,
            validation_split=0.2,
            seed=SEED,
            subset="both",
            image_size=(size, size),
            batch_size=BATCH,
            label_mode="binary",
            verbose=False,
        )


def load(folder: Path, *, augment: bool, size: int = SIZE) -> tuple[Any, Any]:
    """Return training and validation batches from class folders, decoded anew whenever they are read."""
    train, validation = listed(folder, size=size)

    def scale(images: Any, labels: Any) -> tuple[Any, Any]:
        return images / 255.0, labels

    train = train.map(scale, num_parallel_calls=tf.data.AUTOTUNE)
    validation = validation.map(scale, num_parallel_calls=tf.data.AUTOTUNE)
    if augment:
        change = keras.Sequential([keras.layers.RandomZoom(0.1), keras.layers.RandomTranslation(0.1, 0.1)])
        train = train.map(lambda x, y: (change(x, training=True), y), num_parallel_calls=tf.data.AUTOTUNE)
    return train.prefetch(tf.data.AUTOTUNE), validation.prefetch(tf.data.AUTOTUNE)


def cnn(size: int = SIZE, *, rate: float = 3e-5, momentum: float = 0.99) -> Any:
    layers = keras.layers

    def normalised() -> Any:
        return layers.BatchNormalization(momentum=momentum)

    model = keras.Sequential(
        [
            keras.Input((size, size, 3)),
            *(layers.Conv2D(16, 3), normalised(), layers.ReLU(), layers.MaxPooling2D()),
            layers.Dropout(0.2),
            *(layers.Conv2D(32, 3), normalised(), layers.ReLU(), layers.MaxPooling2D()),
            layers.Dropout(0.2),
            *(layers.Conv2D(64, 3), layers.Conv2D(64, 3)),
            *(normalised(), layers.ReLU(), layers.MaxPooling2D(), layers.Dropout(0.4)),
            *(layers.Flatten(), layers.Dense(64, "relu"), layers.Dropout(0.5), layers.Dense(1, "sigmoid")),
        ]
    )
    return compiled(model, rate=rate)


def with_head(base: Any, *, trainable: int, rate: float) -> Any:
    """Put the tutorial's head on a backbone of which the last `trainable` layers train."""
    for layer in base.layers[: len(base.layers) - trainable]:
        layer.trainable = False
    layers = keras.layers
    head = [
        layers.GlobalAveragePooling2D(),
        layers.Dense(128, "relu"),
        layers.Dropout(0.1),
        layers.Dense(1, "sigmoid"),
    ]
    return compiled(keras.Sequential([base, *head]), rate=rate)


def resnet(*, trainable: int, rate: float) -> Any:
    base = keras.applications.ResNet152V2(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    return with_head(base, trainable=trainable, rate=rate)


def from_rgb(model: Any) -> Any:
    """Let a network that takes grey values 0 to 255 be fed the loader's [0, 1] RGB batches."""
    rgb = keras.Input((SIZE, SIZE, 3))
    grey = keras.layers.Lambda(lambda x: x[..., :1] * 255.0, output_shape=(SIZE, SIZE, 1))(rgb)
    return keras.Model(rgb, model(grey))


def compiled(model: Any, *, rate: float) -> Any:
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss="binary_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # on a CPU XLA makes it several times slower: the peer gets the faster setting too
    )
    return model


def predict_one(model: Any, path: Path, *, size: int = SIZE) -> float:
    """Score one file as tutorials do."""
    image = keras.utils.load_img(path, target_size=(size, size))
    return float(model.predict(np.asarray(image)[None] / 255.0, verbose=0)[0, 0])
