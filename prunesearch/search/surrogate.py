"""A Gaussian process over candidates: it predicts the WER of a candidate from those that were trained.

The costs of layers do not add up: two neighbours removed together may cost a fraction of one of them alone, and a pair may cost
more than its sum. So the prior is a sum of parts. Each part has a variance of its own, fitted to the data by marginal
likelihood: single layers, pairs at any distance, neighbours, pairs one apart, the number of layers and the shape of their runs,
the LoRA rank alone, with the number of layers and with each layer, the loss that a scan measured or predicts, alone and with
the number of layers, and a smooth rest over the Hamming distance. So results decide, for small and for large sets, how far the
scan is to be trusted.

Shapes: N candidates, L removable layers, K parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import scipy.linalg

from prunesearch.search.scan_costs import Array
from prunesearch.study.candidate import Candidate

# prior standard deviations of the standardised log WER, part by part
EXPECTED = {
    "one": 1.0, "layers": 0.4, "pairs": 0.05, "neighbours": 0.15, "one apart": 0.1, "runs": 0.4, "rank": 0.1,
    "rank x size": 0.05, "rank x layers": 0.05, "scan": 0.5, "scan x size": 0.1, "rest": 0.2,
}  # fmt: skip
PARTS = tuple(EXPECTED)
# the same where sets of all sizes were screened after the repair: their losses tell most of it, as far as results agree
EXPECTED_SCREENED = EXPECTED | {"scan": 1.0, "layers": 0.15, "runs": 0.15}
NOISE = 0.1
SPREAD = 1.0  # prior standard deviation of the natural logarithm of a variance
FIT_STEPS, FIT_RATE = 60, 0.25
FIT_AT_MOST = 160  # values that the variances are fitted to
REACH = 3.0  # Hamming distance over which the smooth rest falls to 1 / e


class LossModel(Protocol):
    """What a scan says about layer sets, given as rows of zeros and ones (N, L)."""

    def __call__(self, bits: Array) -> tuple[Array, Array]:
        """Features (N, F), such as the logarithm of a set's loss, and the variance of the last one (N,)."""


@dataclass(frozen=True)
class Encoded:
    """Candidates as numbers."""

    bits: Array  # (N, L)
    neighbours: Array  # (N, pairs of layers i, i + 1)
    one_apart: Array  # (N, pairs of layers i, i + 2)
    runs: Array  # (N, 4), scaled to about one
    rank: Array  # (N, 2)
    scan: Array  # (N, F)
    unsure: Array  # (N,): variance of the last of these


@dataclass
class Surrogate:
    """Fitted to candidates and their values (log WER), it predicts the values of other candidates. `layers` are in rising
    order. `scan`: what a scan says about a set. `expected`: prior standard deviations of the parts.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    scan: LossModel | None = None
    expected: Mapping[str, float] = field(default_factory=lambda: EXPECTED)
    variances: Array = field(init=False)

    def __post_init__(self) -> None:
        self.variances = self._expected_variances()
        rng = np.random.default_rng(0)
        width = len(self.layers)
        draws = [Candidate(tuple(rng.choice(self.layers, rng.integers(1, width), False).tolist())) for _ in range(256)]
        raw, _ = self._by_scan(self.bits(draws))
        self._scan_mean, self._scan_sd = raw.mean(0), raw.std(0) + 1e-12

    def _expected_variances(self) -> Array:
        """(K + 1,): of the parts, and of the noise."""
        return np.array([*(self.expected[part] for part in PARTS), NOISE]) ** 2

    def bits(self, candidates: Sequence[Candidate]) -> Array:
        """(N, L): 1 for a removed layer."""
        place = {layer: k for k, layer in enumerate(self.layers)}
        bits = np.zeros((len(candidates), len(self.layers)))
        for row, candidate in zip(bits, candidates, strict=True):
            row[[place[i] for i in candidate.removed_layers if i in place]] = 1.0
        return bits

    def _pairs(self, bits: Array, apart: int) -> Array:
        """For each two layers so far apart in the encoder: whether both are removed."""
        place = {layer: k for k, layer in enumerate(self.layers)}
        both = [(place[i], place[i + apart]) for i in self.layers if i + apart in place]
        left, right = ([pair[side] for pair in both] for side in (0, 1))
        return bits[:, left] * bits[:, right]

    def _by_scan(self, bits: Array) -> tuple[Array, Array]:
        return self.scan(bits) if self.scan else (np.zeros((len(bits), 0)), np.zeros(len(bits)))

    def encode(self, candidates: Sequence[Candidate]) -> Encoded:
        return self.encode_bits(self.bits(candidates), np.array([c.lora_rank for c in candidates], dtype=float))

    def encode_bits(self, bits: Array, lora: Array | None = None) -> Encoded:
        """Of sets (N, L) and ranks (N,); without LoRA by default."""
        lora = np.zeros(len(bits)) if lora is None else lora
        width = bits.shape[1]
        neighbours, one_apart = self._pairs(bits, 1), self._pairs(bits, 2)
        size = bits.sum(1)
        encoder = np.zeros((len(bits), self.layers[-1] + 1))  # a layer that cannot be removed ends a run
        encoder[:, self.layers] = bits
        longest = _longest_runs(encoder)
        runs = np.stack([size, size**2 / width, longest, size - neighbours.sum(1)], 1) / (width / 2)
        top = np.log2(1 + max(self.ranks)) or 1.0
        rank = np.stack([lora > 0, np.log2(1 + lora) / top], 1).astype(float)
        scan, variance = self._by_scan(bits)
        unsure = variance / self._scan_sd[-1] ** 2 if len(self._scan_sd) else variance
        return Encoded(bits, neighbours, one_apart, runs, rank, (scan - self._scan_mean) / self._scan_sd, unsure)

    @staticmethod
    def parts(a: Encoded, b: Encoded) -> Array:
        """(K, N, M): the covariance of each part at unit variance."""
        common = a.bits @ b.bits.T
        sizes = a.bits.sum(1)[:, None], b.bits.sum(1)[None]
        apart = sizes[0] + sizes[1] - 2 * common
        ranks = a.rank @ b.rank.T
        same_rank = np.exp(-np.abs(a.rank[:, 1:] - b.rank[:, 1:].T) * 2)
        half = a.bits.shape[1] / 2
        scan = a.scan @ b.scan.T
        return np.stack(
            [
                np.ones_like(common),
                common,
                (common**2 - common) / 2,
                a.neighbours @ b.neighbours.T,
                a.one_apart @ b.one_apart.T,
                a.runs @ b.runs.T,
                ranks,
                ranks * sizes[0] * sizes[1] / half**2,
                ranks * common,
                scan + (apart == 0) * a.unsure[:, None],
                scan * sizes[0] * sizes[1] / half**2,
                np.exp(-apart / REACH) * same_rank,
            ]
        )

    def covariance(self, a: Encoded, b: Encoded) -> Array:
        """(N, M): the sum of the parts, weighted by the variances, in few passes over (N, M)."""
        v = dict(zip(PARTS, self.variances, strict=False))
        common = a.bits @ b.bits.T
        whole: Array = self._linear(a) @ self._linear(b).T
        factor = a.rank @ b.rank.T
        factor *= v["rank x layers"]
        factor += v["pairs"] / 2 * (common - 1)
        factor *= common
        whole += factor
        # exp(-distance) of the sets and of the ranks, in factors: the last one has few different values
        sets_a, sets_b = (np.exp(-x.bits.sum(1) / REACH) for x in (a, b))
        shared = np.exp(2 / REACH * np.arange(a.bits.shape[1] + 1))[common.astype(np.intp)]
        (ranks_a, at_a), (ranks_b, at_b) = (np.unique(x.rank[:, 1], return_inverse=True) for x in (a, b))
        shared *= np.exp(-2 * np.abs(ranks_a[:, None] - ranks_b))[at_a][:, at_b]
        shared *= v["rest"] * sets_a[:, None]
        shared *= sets_b
        whole += shared
        whole += v["one"]
        if a.unsure.any() and b.unsure.any():  # a set's own deviation from what the scan predicts
            both = a.bits.sum(1)[:, None] + b.bits.sum(1)
            whole += (2 * common == both) * (v["scan"] * a.unsure)[:, None]
        return whole

    def _linear(self, a: Encoded) -> Array:
        """(N, F): features whose inner products are the sum of the linear parts."""
        v = dict(zip(PARTS, np.sqrt(self.variances), strict=False))
        size = a.bits.sum(1, keepdims=True) / (a.bits.shape[1] / 2)
        return np.hstack(
            [
                v["layers"] * a.bits, v["neighbours"] * a.neighbours, v["one apart"] * a.one_apart, v["runs"] * a.runs,
                v["rank"] * a.rank, v["rank x size"] * size * a.rank, v["scan"] * a.scan, v["scan x size"] * size * a.scan,
            ]
        )  # fmt: skip

    @staticmethod
    def own_parts(a: Encoded) -> Array:
        """(K, N): the diagonals of `parts(a, a)`."""
        size, half = a.bits.sum(1), a.bits.shape[1] / 2
        rank = (a.rank**2).sum(1)
        rows = [np.ones_like(size), size, (size**2 - size) / 2]
        rows += [(f**2).sum(1) for f in (a.neighbours, a.one_apart, a.runs)]
        scan = (a.scan**2).sum(1)
        rows += [rank, rank * size**2 / half**2, rank * size, scan + a.unsure, scan * size**2 / half**2, np.ones_like(size)]
        return np.stack(rows)

    def fit(self, candidates: Sequence[Candidate], values: Array, extra: Array) -> None:
        """Find the variances of the parts and of the noise: those of highest posterior density, given the values.

        `values` (N,); `extra` (N,): variances in addition to the noise, for values that are known less precisely.
        """
        seen = self.encode(candidates)
        y, scale = _standardised(values)
        parts = self.parts(seen, seen)
        known = np.diag(extra / scale**2 + 1e-6)
        expected = np.log(self._expected_variances())
        at, slope, size = expected.copy(), np.zeros(len(expected)), np.zeros(len(expected))
        for step in range(1, FIT_STEPS + 1):  # Adam, on logarithms
            variances = np.exp(at)
            inverse = np.linalg.inv(np.tensordot(variances[:-1], parts, 1) + variances[-1] * np.eye(len(y)) + known)
            alpha = inverse @ y
            outer = np.outer(alpha, alpha) - inverse
            gradient = 0.5 * np.append(np.einsum("kij,ij->k", parts, outer), np.trace(outer)) * variances
            gradient -= (at - expected) / SPREAD**2
            slope = 0.9 * slope + 0.1 * gradient
            size = 0.99 * size + 0.01 * gradient**2
            at += FIT_RATE * (slope / (1 - 0.9**step)) / (np.sqrt(size / (1 - 0.99**step)) + 1e-8)
        self.variances = np.exp(at)

    def given(self, candidates: Sequence[Candidate], values: Array, extra: Array) -> "Posterior":
        """The posterior, given these values."""
        seen = self.encode(candidates)
        y, scale = _standardised(values)
        noise = self.variances[-1] + extra / scale**2 + 1e-6
        lower: Array = scipy.linalg.cholesky(self.covariance(seen, seen) + np.diag(noise), lower=True)
        weights = scipy.linalg.cho_solve((lower, True), y)
        return Posterior(self, seen, lower, weights, float(values.mean()), scale)


@dataclass(frozen=True)
class Posterior:
    """Predictions, given the values of some candidates."""

    surrogate: Surrogate
    seen: Encoded
    lower: Array
    weights: Array
    mean: float
    scale: float

    @property
    def noise(self) -> float:
        """Standard deviation of the values of one system, over trainings from several seeds."""
        return self.scale * float(np.sqrt(self.surrogate.variances[-1]))

    def predict(self, candidates: Sequence[Candidate]) -> tuple[Array, Array]:
        """Mean (N,) and standard deviation (N,) of the values, without noise."""
        return self.predict_encoded(self.surrogate.encode(candidates))

    def predict_encoded(self, asked: Encoded) -> tuple[Array, Array]:
        """As `predict`."""
        variances = self.surrogate.variances[:-1]
        across = self.surrogate.covariance(asked, self.seen)
        explained = scipy.linalg.solve_triangular(self.lower, across.T, lower=True)
        variance = np.maximum(variances @ self.surrogate.own_parts(asked) - (explained**2).sum(0), 1e-12)
        return self.mean + self.scale * (across @ self.weights), self.scale * np.sqrt(variance)


def _standardised(values: Array) -> tuple[Array, float]:
    scale = float(values.std()) or 1.0
    return (values - values.mean()) / scale, scale


def _longest_runs(bits: Array) -> Array:
    """(N, L) -> (N,)"""
    longest = here = np.zeros(len(bits))
    for column in bits.T:
        here = (here + 1) * column
        longest = np.maximum(longest, here)
    return longest
