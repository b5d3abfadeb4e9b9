"""Scores, all higher-is-better; those that are more than a mean are scikit-learn's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


def predict(logits: Logits) -> NDArray[np.int64]:
    """Return the most likely class of every row of logits (N, C)."""
    predicted: NDArray[np.int64] = logits.argmax(axis=1).astype(np.int64)
    return predicted


def probabilities(logits: Logits) -> Logits:
    """Return the softmax of logits (N, C)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Logits = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def score(metric: str, labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Return the score of predicted class indices: accuracy, balanced_accuracy or macro_f1."""
    if metric == "accuracy":  # asked of every head after every round
        return float(np.mean(labels == predicted))
    from sklearn import metrics

    if metric == "balanced_accuracy":
        return float(metrics.balanced_accuracy_score(labels, predicted))
    return float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))


def log_loss(labels: NDArray[np.int64], logits: Logits) -> float:
    """Return the mean negative log-likelihood in nats."""
    chosen = probabilities(logits)[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(chosen, 1e-12, None)).mean())
