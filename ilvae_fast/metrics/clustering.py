"""Clusters against labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._support.checks import check_tensor
from .._support.extras import require


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """The largest fraction of data whose cluster stands for their label, over all one-to-one assignments of the two.

    Args:
        clusters: (N,) integers from 0. Of a mixture, the cluster of x is ``model.inference(x).logits.argmax(-1)``.
        labels: (N,) integers from 0; there may be more or fewer classes than clusters.

    The assignment is found by the Hungarian method (Kuhn, 1955), as is usual since Yang et al. (2010).

    Raises:
        ValueError: shapes that differ, no datum, or negative numbers.
        ImportError: SciPy is not installed; says how to install it.
    """
    table = _counts(clusters, labels)
    optimize = require("scipy.optimize", "train")
    rows, columns = optimize.linear_sum_assignment(table.numpy(), maximize=True)
    return int(table[rows, columns].sum()) / len(labels)


def clustering_majority(clusters: Tensor, labels: Tensor) -> float:
    """The fraction of data whose label is the most frequent one of their cluster, also called purity: several clusters
    may stand for one label, so that it is at least :func:`clustering_accuracy` and grows with their number.

    Args:
        clusters: as there.
        labels: as there.

    Raises:
        ValueError: as there.
    """
    return int(_counts(clusters, labels).amax(1).sum()) / len(labels)


def _counts(clusters: Tensor, labels: Tensor) -> Tensor:
    """How many data have each cluster and label: (clusters, classes)."""
    check_tensor("clusters", clusters)
    check_tensor("labels", labels)
    if clusters.shape != labels.shape or clusters.dim() != 1:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, wanted that of clusters, {tuple(clusters.shape)}")
    if len(labels) == 0:
        raise ValueError("labels: got no datum, wanted at least one")
    for name, values in (("clusters", clusters), ("labels", labels)):
        if int(values.min()) < 0:
            raise ValueError(f"{name}: got {int(values.min())}, wanted numbers >= 0")
    classes = int(labels.max()) + 1
    shape = (int(clusters.max()) + 1, classes)
    pairs = clusters.cpu() * classes + labels.cpu()
    return torch.bincount(pairs, minlength=shape[0] * classes).reshape(shape)
