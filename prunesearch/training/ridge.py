"""Ridge regression of one linear map, from sums that are collected batch by batch. Shapes: N rows, I inputs, O outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

# relative ridge strengths that are tried; the last one keeps the weights as they are
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 1e9)


class NormalEquations:
    """Sums over rows of inputs x and residuals r = y - (W x + b), batch by batch: no corpus is in memory.

    Of a map without a bias, the fit has none either: nothing is centred. A batch's products are computed in fp32 and added up
    in float64, in the order of the batches.
    """

    def __init__(self, linear: nn.Linear):
        device, inputs, outputs = linear.weight.device, linear.in_features, linear.out_features
        self.linear = linear
        self._weight = linear.weight.detach().float()
        self._bias = linear.bias.detach().float() if linear.bias is not None else torch.zeros(outputs, device=device)
        self.rows = 0
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.r = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xr = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.rr = torch.zeros((), dtype=torch.float64, device=device)
        self.x_origin, self.r_origin = torch.zeros_like(self.x), torch.zeros_like(self.r)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Inputs (N, I) and what the map should put out for them (N, O)."""
        x = x.float()
        residual = y.float() - torch.addmm(self._bias, x, self._weight.T)
        if not self.rows:  # sums about a nearby point keep their precision in fp32
            self.x_origin, self.r_origin = x.mean(0), residual.mean(0)
        x, residual = x - self.x_origin, residual - self.r_origin
        self.rows += len(x)
        self.x += x.sum(0)
        self.r += residual.sum(0)
        self.xx += x.T @ x
        self.xr += x.T @ residual
        self.rr += residual.square().sum()

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of the inputs (I,) and of the residuals (O,); zeros if the map has no bias, which takes the means up."""
        if self.linear.bias is None:
            return torch.zeros_like(self.x), torch.zeros_like(self.r)
        return self.x_origin + self.x / self.rows, self.r_origin + self.r / self.rows

    def centred(self, x_mean: Tensor, r_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of products (I, I), (I, O) and () about the given means."""
        n, x_mean, r_mean = self.rows, x_mean - self.x_origin, r_mean - self.r_origin
        xx = self.xx - torch.outer(self.x, x_mean) - torch.outer(x_mean, self.x) + n * torch.outer(x_mean, x_mean)
        xr = self.xr - torch.outer(self.x, r_mean) - torch.outer(x_mean, self.r) + n * torch.outer(x_mean, r_mean)
        rr = self.rr - 2 * self.r @ r_mean + n * r_mean @ r_mean
        return xx, xr, rr


@dataclass(frozen=True)
class Solution:
    """A refitted linear map: weight (O, I), bias (O,) or None. `ridge`: the relative strength that was chosen.
    `unexplained`: the squared error on the held-out rows, as a fraction of the error before; `error`: the same, per row.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float
    unexplained: float
    error: float


@torch.no_grad()
def solve(fit: NormalEquations, held_out: NormalEquations, ladder: Sequence[float] = LADDER) -> Solution:
    """Minimise ||Y - X V - c||² + λ s ||V - W||²: least squares with a ridge towards the map's own weights W.

    s is the mean of the inputs' sums of squares, so that λ does not depend on their scale. From the middle of the ladder, λ
    walks to where the error on the held-out rows is smallest. Each λ that is tried takes a Cholesky factorisation; the four or
    five of a walk are faster together than one eigendecomposition, which would serve all λ.
    """
    x_mean, r_mean = fit.means
    xx, xr, _ = fit.centred(x_mean, r_mean)
    scale = xx.diagonal().mean().clamp(min=1e-30)  # inputs that never change are left alone
    held_xx, held_xr, held_rr = held_out.centred(x_mean, r_mean)

    @cache
    def tried(place: int) -> tuple[float, Tensor]:
        """The squared error on the held-out rows, and the change of the weights, transposed: (I, O).

        The error is infinite where λ is smaller than the rounding errors of the sums, as it may be if a few inputs are by far
        larger than the others (Whisper's feed-forward layers have such).
        """
        regular = xx.clone()
        regular.diagonal().add_(ladder[place] * scale)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if failed:
            return math.inf, torch.zeros_like(xr)
        change = torch.cholesky_solve(xr, factor)
        return float(held_rr - 2 * (change * held_xr).sum() + (change * (held_xx @ change)).sum()), change

    best = len(ladder) // 2
    while math.isinf(tried(best)[0]) and best + 1 < len(ladder):
        best += 1
    for step in (1, -1):
        while 0 <= best + step < len(ladder) and tried(best + step)[0] < tried(best)[0]:
            best += step
    error, change = tried(best)
    delta = change.T
    weight = fit.linear.weight.detach().double() + delta
    bias = None if fit.linear.bias is None else fit.linear.bias.detach().double() + r_mean - delta @ x_mean
    zero = torch.zeros_like
    before = float(held_out.centred(zero(x_mean), zero(r_mean))[2])  # without any change of weights or bias
    return Solution(weight, bias, ladder[best], error / before if before else 1.0, error / held_out.rows)
