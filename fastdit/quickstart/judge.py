"""A small classifier fitted on held-out real images, for class accuracy and Frechet distance features."""

import warnings
from pathlib import Path

import numpy as np

from fastdit.evaluation.features import save_classifier


class Judge:
    """A perceptron with one hidden layer of 64 on 16 x 16 gray thumbnails; its hidden layer gives the features.

    This suffices for digits (accuracy 0.97 on unseen images) and takes a second to fit. For natural images use
    Inception features. `fastdit evaluate --features classifier=FILE` reads what `save` writes.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int = 0):
        """images uint8 (N, H, W, 3) with H = W a multiple of 16, labels (N,)."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        self.classifier = MLPClassifier((64,), alpha=0.1, max_iter=400, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stop after 400 epochs, converged or not
            self.classifier.fit(thumbnails(images), labels)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The fraction of images that are classified correctly."""
        return float(self.classifier.score(thumbnails(images), labels))

    def features(self, images: np.ndarray) -> np.ndarray:
        """The output of the hidden layer after its ReLU: (N, 64)."""
        hidden = thumbnails(images) @ self.classifier.coefs_[0] + self.classifier.intercepts_[0]
        return hidden.clip(0)

    def save(self, path: Path) -> None:
        """Write the layers: (64, 256), (64,), (classes, 64), (classes,)."""
        layers = zip(self.classifier.coefs_, self.classifier.intercepts_, strict=True)
        save_classifier(path, *(array for weight, bias in layers for array in (weight.T, bias)))


def thumbnails(images: np.ndarray, size: int = 16) -> np.ndarray:
    """uint8 (N, H, W, 3) -> gray means in [0, 1] over a size x size grid, flattened (N, size size)."""
    n, height, width, _ = images.shape
    cells = images.reshape(n, size, height // size, size, width // size, 3)
    return cells.mean(axis=(2, 4, 5)).reshape(n, -1) / 255
