"""Exact expectations of the production functions over all outcomes of an enumerated language, and
finite differences."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import torch

from seqkd.studies.enumerated import gradient

CHUNK = 256
"""Number of tuples per batch. It is limited because the leave-one-out baseline compares all rows of
a batch with each other."""


def select(stats, rows, group, weight=None):
    """Build a batch of the sequences with indices ``rows``, which may repeat."""
    picked = {
        f.name: value[rows]
        for f in fields(stats)
        if f.name not in ("group", "weight") and (value := getattr(stats, f.name)) is not None
    }
    return replace(stats, **picked, group=torch.as_tensor(group), weight=weight)


def expected_gradient(language, theta, loss_of, probabilities, samples=1):
    """Compute the expected gradient of ``loss_of(stats)`` over tuples of ``samples`` independent
    sequences of one prompt, which have ``probabilities`` [N]."""
    tuples = torch.tensor(list(product(range(len(language.sequences)), repeat=samples)))
    result = torch.zeros_like(theta)
    for part in tuples.split(CHUNK):
        chance = probabilities[part].prod(1)
        rows, group = part.flatten(), torch.arange(len(part)).repeat_interleave(samples)

        def loss(at, rows=rows, group=group, chance=chance):
            stats = language.stats(at)
            weight = chance.repeat_interleave(samples)
            if stats.weight is not None:
                weight = weight * stats.weight[rows]
            return loss_of(select(stats, rows, group, weight))

        result += gradient(loss, theta)
    return result


def finite_difference(function, theta, step=1e-6):
    """Compute a gradient by central differences."""
    result = torch.zeros_like(theta)
    for index in range(theta.numel()):
        shift = torch.zeros_like(theta)
        shift.view(-1)[index] = step
        result.view(-1)[index] = (function(theta + shift) - function(theta - shift)) / (2 * step)
    return result
