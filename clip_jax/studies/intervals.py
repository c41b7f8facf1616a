"""The paired difference of two rows of a study and its interval over seeds and images.

With the outcomes a and b of two rows on the same N images with the same S seeds, d_si = a_si - b_si, and the mean d of
all d_si,

    V_G  = G / (G - 1)         sum_g  (sum_{s, i in g} (d_si - d))^2 / (S N)^2
    V_S  = S / (S - 1)         sum_s  (sum_i (d_si - d))^2           / (S N)^2
    V_GS = S G / (S G - 1)     sum_gs (sum_{i in g} (d_si - d))^2    / (S N)^2
    V    = max(V_G + V_S - V_GS, V_G, V_S)

is the variance of d, clustered in two ways (Cameron, Gelbach & Miller 2011): by the G things that the images show, and
by the S seeds. Images of one thing, and all images of one seed, may depend on each other. The interval is
d +- t sqrt(V) with the 97.5 % quantile t of Student's distribution, whose degrees of freedom are Satterthwaite's
(1946): V^2 / (V_G^2 / (G - 1) + V_S^2 / (S - 1)). Nothing is drawn at random.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two rows in a metric.

    Attributes:
      mean: the difference, a fraction.
      low, high: its 95 % interval; NaN when nothing tells it.
      seeds, images, things: what it was computed from; 0 images when only the means of the seeds are known.
    """

    mean: float
    low: float
    high: float
    seeds: int
    images: int = 0
    things: int = 0

    @property
    def excludes_zero(self):
        """Whether there are several seeds and the interval excludes 0."""
        return self.seeds > 1 and (self.low > 0 or self.high < 0)


def paired(a, b):
    """Returns the `Difference` a - b of outcomes on the same images with the same seeds.

    Args:
      a, b: lists of `clip_jax.evaluation.results.Outcomes`, one for each seed.
    """
    d = np.stack([x.values.astype(np.float64) - y.values for x, y in zip(a, b, strict=True)])  # [seeds, images]
    (seeds, images), mean = d.shape, d.mean()
    _, group = np.unique(a[0].groups, return_inverse=True)
    things = int(group.max()) + 1
    cells = np.stack([np.bincount(group, row, things) for row in d - mean]) / d.size  # [seeds, things]
    by_thing, by_seed = _variance(cells.sum(0)), _variance(cells.sum(1))
    variance = max(by_thing + by_seed - _variance(cells.ravel()), by_thing, by_seed)
    freedom = sum(v**2 / (n - 1) for v, n in ((by_thing, things), (by_seed, seeds)) if n > 1)
    half = _half_width(variance, variance**2 / freedom if freedom else math.inf)
    if max(things, seeds) < 2:
        half = math.nan
    return Difference(float(mean), float(mean - half), float(mean + half), seeds, images, things)


def of_seeds(a, b):
    """Returns the `Difference` of the means of two rows, paired by seed, where the images are not known.

    Args:
      a, b: lists of fractions, one for each seed.
    """
    d = np.subtract(a, b)
    half = _half_width(d.var(ddof=1) / len(d), len(d) - 1) if len(d) > 1 else math.nan
    return Difference(float(d.mean()), float(d.mean() - half), float(d.mean() + half), len(d))


def _variance(sums):
    """Returns the variance of a total of independent sums with the mean 0, float64 `[n]`; 0 for a single one."""
    return float(len(sums) / (len(sums) - 1) * np.square(sums).sum()) if len(sums) > 1 else 0.0


def _half_width(variance, freedom):
    from scipy.stats import t

    return float(t.ppf(0.975, freedom) * math.sqrt(variance)) if variance else 0.0
