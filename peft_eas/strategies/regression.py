"""A Bayesian linear regression of log losses on what was skipped; plain numbers, no tensors of a model.

Source: Student-t noise and coefficients as scale mixtures of normals, fitted by expectation maximisation: Lange,
Little and Taylor, "Robust Statistical Modeling Using the t Distribution" (JASA, 1989).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Degrees of freedom of the Student-t distributions. Few: one catastrophic set, or one vital attention, must not set
# the scale for all others.
NOISE_FREEDOM, COST_FREEDOM = 10.0, 3.0
ITERATIONS = 12
# Losses that differ by less are as good as equal.
LEAST_SPREAD = 1e-6
NUM_KINDS = 3
# What a set tells of the costs around the best set fades with the number of candidates in which the two differ,
# because costs do not quite add up: its noise variance grows by this share of it for each.
FADING = 0.3


class Observations(NamedTuple):
    """N losses. Losses of one group were taken on one batch, or close in time; a kind has its own level and noise.

    `skipped` is (N, n), 1.0 where a candidate was skipped; `features` (N, p) are what costs are of, see `sets`;
    `values` (N,) are log losses; `group` (N,) counts from 0 without gaps; `kind` (N,) is below `NUM_KINDS`, the same
    for a whole group; `trust` (N,) is how much a loss counts, 1.0 in full.
    """

    skipped: np.ndarray
    features: np.ndarray
    values: np.ndarray
    group: np.ndarray
    kind: np.ndarray
    trust: np.ndarray


class Posterior(NamedTuple):
    """Costs ~ N(mean, root rootᵀ) of the p features; and by kind of observation the level (what a set costs beyond the
    sum of its costs) and the standard deviation of the noise."""

    mean: np.ndarray
    root: np.ndarray
    level: np.ndarray
    noise: np.ndarray


def prior(num_features: int) -> Posterior:
    """What is known before the first loss: nothing."""
    return Posterior(np.zeros(num_features), np.eye(num_features), np.zeros(0), np.zeros(0))


def fit(
    data: Observations, choose: Callable[[np.ndarray], Sequence[int]], hint: np.ndarray | None = None
) -> Posterior:
    """The posterior of the costs w in

        value = level of its kind + effect of its group + features · w + noise.

    Args:
        data: at least one loss.
        choose: the indices of the candidates in the best set, for given costs of the features.
        hint: (n,) what the candidates' costs may go with, of mean 0 and standard deviation 1; how far is learned.
    """
    num, candidates = data.features.shape[1], data.skipped.shape[1]
    kinds, groups = NUM_KINDS, data.group.max() + 1
    kind_of_group = np.zeros(groups, int)
    kind_of_group[data.group] = data.kind
    columns = [data.features, np.eye(kinds)[data.kind]]
    if hint is not None:
        columns.append(data.skipped @ hint[:, None])
    design = np.concatenate(columns, 1)
    width = design.shape[1]
    cells = (data.group[:, None] * width + np.arange(width)).ravel()  # of a matrix with a row for each group
    # Each kind has a height of its own, which is put back in the end.
    heights = np.array(
        [np.median(data.values[data.kind == k]) if (data.kind == k).any() else 0.0 for k in range(kinds)]
    )
    values = data.values - heights[data.kind]
    size = data.skipped.sum(1).mean()

    # Scales to start from, and to hold on to where the data are few.
    typical = _typical_spread(data, values)
    start = typical**2 * candidates / max(1.0, size * (candidates - size))
    cost_scale, cost_variance = start, np.full(num, start)
    noise, between = np.full(kinds, (0.3 * typical) ** 2), np.full(kinds, typical**2)
    weight, trust = np.ones(len(values)), data.trust
    # A loss that counts by half is half a loss, or the noise would be taken for less than it is.
    of_kind = np.bincount(data.kind, data.trust, kinds), np.bincount(kind_of_group, minlength=kinds)
    fixed_precision = np.concatenate([np.full(kinds, 1e-4 / start), *([[1.0 / start]] if hint is not None else [])])
    to_costs = np.zeros((num, width))
    to_costs[:, :num] = np.eye(num)
    if hint is not None:
        to_costs[:candidates, -1] = hint

    for iteration in range(ITERATIONS):
        precision = weight * trust / noise[data.kind]
        weighted = design * precision[:, None]
        # Each group's effect is integrated out.
        total = np.bincount(data.group, precision, groups)
        effect_variance = 1.0 / (1.0 / between[kind_of_group] + total)
        by_group = np.bincount(cells, weighted.ravel(), groups * width).reshape(groups, width)
        scaled = by_group * effect_variance[:, None]
        information = weighted.T @ design - scaled.T @ by_group
        known = np.concatenate([1.0 / cost_variance, fixed_precision])
        information[np.diag_indices_from(information)] += known
        covariance = _inverse(information)
        towards = weighted.T @ values - scaled.T @ np.bincount(data.group, precision * values, groups)
        mean = covariance @ towards

        residual = values - design @ mean
        effect = effect_variance * np.bincount(data.group, precision * residual, groups)
        squares = (residual - effect[data.group]) ** 2
        weight = (NOISE_FREEDOM + 1.0) / (NOISE_FREEDOM + squares / noise[data.kind])
        spent = (width - (known * np.diag(covariance)).sum()) / data.trust.sum()
        spent_on_groups = np.bincount(kind_of_group, total * effect_variance, kinds)
        free = np.maximum(1.0, of_kind[0] * (1.0 - spent) - spent_on_groups)
        noise = 2 * (0.1 * typical) ** 2 + np.bincount(data.kind, weight * trust * squares, kinds)
        noise /= 2 + free
        between = 2 * (0.3 * typical) ** 2 + np.bincount(kind_of_group, effect**2 + effect_variance, kinds)
        between /= 2 + of_kind[1]
        costs_squared = (mean**2 + np.diag(covariance))[:num]
        cost_precision = (COST_FREEDOM + 1.0) / (COST_FREEDOM * cost_scale + costs_squared)
        cost_variance = 1.0 / cost_precision
        cost_scale = (num + 2) / (cost_precision.sum() + 2 / start)
        if iteration >= 2:
            best = np.zeros(candidates)
            best[choose(to_costs @ mean)] = 1.0
            trust = data.trust / (1.0 + FADING * np.abs(data.skipped - best).sum(1))

    variance = to_costs @ covariance @ to_costs.T
    root = np.linalg.cholesky(variance + 1e-9 * np.trace(variance) / num * np.eye(num))
    level = mean[num : num + kinds] + heights
    return Posterior(to_costs @ mean, root, level, np.sqrt(noise))


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric positive definite matrix whose diagonal may span many powers of ten, as without any noise."""
    scale = 1.0 / np.sqrt(np.diag(matrix))
    scaled = matrix * np.outer(scale, scale) + 1e-12 * np.eye(len(matrix))
    inverse = np.linalg.inv(scaled) * np.outer(scale, scale)
    return (inverse + inverse.T) / 2.0


def _typical_spread(data: Observations, values: np.ndarray) -> float:
    """A robust standard deviation of the values within their groups."""
    sizes = np.bincount(data.group)
    within = values - (np.bincount(data.group, values) / sizes)[data.group]
    within = within[sizes[data.group] > 1]
    if len(within) == 0:
        return 1.0
    # 1.48 times the median is the standard deviation of normal values.
    return max(1.4826 * float(np.median(np.abs(within))), 0.3 * float(within.std()), LEAST_SPREAD)
