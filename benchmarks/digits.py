"""A small task for exact retraining: handwritten digits and a perceptron with one hidden layer.

scikit-learn's 1,797 digits need no download. Many models, one per training set, are trained at once as batched matrix
products, with full batches and the same initial weights. So outputs differ only because of the training set. An image's
gradient is that of its log-likelihood at the model trained on all images. The engine's projection sketches it like a
problem's gradient (outer products, as in any linear layer), and a store keeps it.

Dimension letters: M models, P images of the training set, Q test images, I inputs and one for the bias, H hidden units,
C classes, D sketch dimensions.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import gradstore
from gradstore import Store
from gradstore.engine.sketches.projection import Projection, dense_projection

N_CLASSES = 10
Weights = tuple[torch.Tensor, torch.Tensor]
"""First layer [M, H, I], second layer [M, C, H + 1]; biases are the last column."""


@dataclass(frozen=True)
class DigitsTask:
    """Settings of the task; equal settings give equal numbers."""

    n_train: int = 1000
    n_test: int = 200
    hidden: int = 64
    steps: int = 120
    learning_rate: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1.5e-3
    """L2 penalty: this factor times half the squared weights is added to the mean loss."""
    wrong_labels: float = 0.0
    """Share of the training images with a wrong label."""
    seed: int = 0

    @cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(train images [P, I], labels [P], test images [Q, I], labels [Q]); images float64 in [0, 1], then a 1."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(self.seed).permutation(len(labels))[: self.n_train + self.n_test]
        inputs = torch.tensor(np.c_[images[order] / 16, np.ones(len(order))])
        targets = torch.tensor(labels[order])
        train, test = slice(self.n_train), slice(self.n_train, None)
        shown = targets[train].clone()
        wrong = torch.tensor(self.wrong)
        shift = np.random.default_rng([self.seed, 2]).integers(1, N_CLASSES, self.n_train)
        shown[wrong] = (shown[wrong] + torch.tensor(shift)[wrong]) % N_CLASSES
        return inputs[train], shown, inputs[test], targets[test]

    @cached_property
    def wrong(self) -> np.ndarray:
        """Training images with a wrong label, bool [P]."""
        wrong_P = np.zeros(self.n_train, bool)
        n = round(self.wrong_labels * self.n_train)
        wrong_P[np.random.default_rng([self.seed, 1]).choice(self.n_train, n, replace=False)] = True
        return wrong_P

    def train(self, subsets_MP: np.ndarray) -> Weights:
        """Train one model per training set (bool [M, P]), all from the same initial weights."""
        images_PI, labels_P, _, _ = self.data
        subsets = torch.tensor(subsets_MP, dtype=torch.float64)
        shares_MP = subsets / subsets.sum(dim=1, keepdim=True)
        first, second = (weight.repeat(len(subsets), 1, 1) for weight in self._start)
        speeds = [torch.zeros_like(first), torch.zeros_like(second)]
        for _ in range(self.steps):
            hidden_MPH, error_MPC = _errors(images_PI, labels_P, (first, second))
            error_MPC = error_MPC * shares_MP[:, :, None]
            back_MPH = (error_MPC @ second[:, :, :-1]) * (1 - hidden_MPH[:, :, :-1] ** 2)
            ascents = (back_MPH.transpose(1, 2) @ images_PI, error_MPC.transpose(1, 2) @ hidden_MPH)
            for weight, ascent, speed in zip((first, second), ascents, speeds, strict=True):
                speed.mul_(self.momentum).add_(ascent - self.weight_decay * weight)
                weight.add_(self.learning_rate * speed)
        return first, second

    def outputs(self, weights: Weights, which: str = "test") -> np.ndarray:
        """Log-likelihood of each test (or `train`) image's label, float64 [M, Q]."""
        images_PI, labels_P, images_QI, labels_Q = self.data
        inputs, labels = (images_QI, labels_Q) if which == "test" else (images_PI, labels_P)
        _, logits = _forward(inputs, weights)
        chosen = labels[None, :, None].expand(len(logits), -1, 1)
        return torch.log_softmax(logits, dim=2).gather(2, chosen)[:, :, 0].numpy()

    def retrain(self, subsets_MP: np.ndarray, at_once: int = 50) -> np.ndarray:
        """Train a model on each set; its outputs on the test images, float64 [M, Q]."""
        parts = [subsets_MP[start : start + at_once] for start in range(0, len(subsets_MP), at_once)]
        return np.concatenate([self.outputs(self.train(part)) for part in parts])

    @cached_property
    def whole(self) -> Weights:
        """The model trained on all images."""
        return self.train(np.ones((1, self.n_train), bool))

    def patch(self, places: np.ndarray, rate: float = 0.1) -> np.ndarray:
        """Change of each test image's output after one gradient step on some training images: float64 [Q]."""
        images_PI, labels_P, _, _ = self.data
        first, second = self.whole
        some = torch.tensor(np.asarray(places))
        hidden, error = _errors(images_PI[some], labels_P[some], self.whole)
        back = (error @ second[:, :, :-1]) * (1 - hidden[:, :, :-1] ** 2)
        step = rate / len(some)
        moved = (
            first + step * (back.transpose(1, 2) @ images_PI[some]),
            second + step * (error.transpose(1, 2) @ hidden),
        )
        return (self.outputs(moved) - self.outputs(self.whole))[0]

    def cores(self, which: str = "train") -> np.ndarray:
        """Exact gradients of the log-likelihoods at the model trained on all images: float64 [P, H I + C (H + 1)]."""
        images_PI, labels_P, images_QI, labels_Q = self.data
        inputs, labels = (images_PI, labels_P) if which == "train" else (images_QI, labels_Q)
        hidden, error = _errors(inputs, labels, self.whole)
        back = (error @ self.whole[1][:, :, :-1]) * (1 - hidden[:, :, :-1] ** 2)
        layers = (torch.einsum("ph,pi->phi", back[0], inputs), torch.einsum("pc,ph->pch", error[0], hidden[0]))
        return torch.cat([layer.flatten(1) for layer in layers], dim=1).numpy()

    def projection(self, dim: int) -> Projection:
        """The engine's dense projection of the two layers' gradients to `dim` dimensions."""
        layers = [("hidden", self.hidden, 65), ("output", N_CLASSES, self.hidden + 1)]
        return dense_projection(layers, max(65, self.hidden + 1), dim, self.seed)

    def store(self, path: Path, dim: int = 256, dtype: str = "fp32") -> Store:
        """A store of the projected gradients: collections `train` and `test`, step 0, ids `train-0`, `test-0`, ..."""
        projection = self.projection(dim)
        fingerprint = {"task": "digits", "layout": projection.layout, "projection": projection.digest()}
        store = gradstore.create(path, dim=projection.dim, fingerprint=fingerprint, dtype=dtype)
        _, labels_P, _, labels_Q = self.data
        for name, labels in (("train", labels_P), ("test", labels_Q)):
            ids = [f"{name}-{i}" for i in range(len(labels))]
            truths = [str(label) for label in labels.tolist()]
            records = [
                {"id": one, "prompt": f"digit {one}", "source": truth, "ground_truth": truth}
                for one, truth in zip(ids, truths, strict=True)
            ]
            store.add_problems(name, records)
            with store.writer(name, step=0) as writer:
                writer.append(ids, folded(projection, self.cores(name)).astype(np.float32))
        return store

    @property
    def _start(self) -> Weights:
        random = torch.Generator().manual_seed(self.seed)
        first = torch.randn(1, self.hidden, 65, generator=random, dtype=torch.float64) / 8
        second = torch.randn(1, N_CLASSES, self.hidden + 1, generator=random, dtype=torch.float64) / self.hidden**0.5
        return first, second


def folded(projection: Projection, cores_PC: np.ndarray) -> np.ndarray:
    """Sketch exact gradients by the projection's fold: float64 [P, D]."""
    fold = projection.fold
    sketches_PD = np.zeros((len(cores_PC), projection.dim))
    if fold is None:
        return cores_PC
    np.add.at(sketches_PD.T, fold.to_M, (cores_PC[:, fold.of_M] * fold.sign_M).T)
    return sketches_PD


def _forward(inputs_PI: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden units with a 1 appended [M, P, H + 1], and logits [M, P, C]."""
    first, second = weights
    hidden = torch.tanh(inputs_PI @ first.transpose(1, 2))
    hidden = torch.cat([hidden, torch.ones_like(hidden[:, :, :1])], dim=2)
    return hidden, hidden @ second.transpose(1, 2)


def _errors(inputs_PI: torch.Tensor, labels_P: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden units [M, P, H + 1], and derivatives of the log-likelihoods with respect to the logits [M, P, C]."""
    hidden, logits = _forward(inputs_PI, weights)
    return hidden, torch.nn.functional.one_hot(labels_P, N_CLASSES) - torch.softmax(logits, dim=2)
