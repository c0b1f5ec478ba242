"""Do drawn pictures look like real ones, all together? FID, KID, precision and recall, density and coverage.

Each is a comparison of two clouds of feature vectors, and each depends on how many there are: FID falls with n for
the very same model. So none stands alone: beside it stands the floor, the same figure at the same n for real pictures
that the model has not learned from. A model as good as new pictures of the data set reaches the floor.

The Fréchet distance and KID's kernel are torchmetrics'. Its KID wants two samples of one size and has no interval, and
no maintained library has density and coverage, so these are here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.metrics.intervals import mean_figure, resamples, spread_figure
from ldm.evaluation.metrics.retrieval import distances

NEIGHBORS = 5  # Naeem et al. 2020, section 4
FID_RESAMPLES = 50


class _Features(torch.nn.Module):
    """Vectors as they are, for metrics that expect pictures and a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def require_torchmetrics() -> None:
    """Raise a ModuleNotFoundError with the command that installs it, before anything is computed."""
    import importlib.util

    if importlib.util.find_spec("torchmetrics") is None:
        raise ModuleNotFoundError("torchmetrics is missing; install it with: pip install 'ldm[metrics]'")


def fid(drawn: Tensor, real: Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of vectors [N,D] and [M,D] (Heusel et al. 2017, eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(drawn.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def in_their_span(drawn: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds in an orthonormal basis of the space that they span, where every distance and the FID are the same.

    A few hundred vectors of 2,048 dimensions span a few hundred; the matrix square root costs the cube of that.
    """
    together = torch.cat([drawn, real]).double()
    if len(together) >= together.shape[1]:
        return drawn.double(), real.double()
    basis = torch.linalg.qr((together - together.mean(0)).T)[0]  # (D, N + M)
    return tuple(((together - together.mean(0)) @ basis).split([len(drawn), len(real)]))  # type: ignore[return-value]


def fid_figure(drawn: Tensor, real: Tensor, count: int = FID_RESAMPLES) -> dict[str, Any]:
    """FID, with an interval over the choice of the drawn pictures."""
    drawn, real = in_their_span(drawn, real)
    resampled = torch.tensor([fid(drawn[chosen], real) for chosen in resamples(len(drawn), count)])
    return spread_figure(fid(drawn, real), resampled, len(drawn))


def kid_figure(drawn: Tensor, real: Tensor, count: int) -> dict[str, Any]:
    """The unbiased squared MMD with the kernel (x y / D + 1)^3 (Bińkowski et al. 2018, eq. 4), with an interval.

    The interval is over the choice of the drawn pictures. Two draws of one picture are no pair: their kernel would
    make the resampled estimates larger than the figure (the same exclusion as i != j in the estimator).
    """
    from torchmetrics.image.kid import poly_kernel

    drawn, real = drawn.double(), real.double()
    within, between = poly_kernel(drawn, drawn), poly_kernel(drawn, real)
    n, m = len(drawn), len(real)
    kernel_real = poly_kernel(real, real)
    among_real = (kernel_real.sum() - kernel_real.trace()) / (m * (m - 1))
    within.fill_diagonal_(0.0)

    def estimate(weights: Tensor) -> Tensor:
        """weights [R,n]: how often each drawn picture counts => [R]."""
        pairs = (weights.sum(1) ** 2 - weights.square().sum(1)).clamp(min=1)
        among_drawn = ((weights @ within) * weights).sum(1) / pairs
        return among_drawn + among_real - 2 * (weights @ between.mean(1)) / weights.sum(1)

    counts = torch.zeros(count, n, dtype=torch.float64)
    counts.scatter_add_(1, resamples(n, count), torch.ones(count, n, dtype=torch.float64))
    return spread_figure(float(estimate(torch.ones(1, n, dtype=torch.float64))), estimate(counts), n)


def neighborhood(drawn: Tensor, real: Tensor, k: int = NEIGHBORS) -> dict[str, Tensor]:
    """Precision, recall, density, coverage, each as values whose mean it is: per drawn or per real picture.

    precision  a drawn picture lies in the k-nearest-neighbor ball of a real one   (Kynkäänniemi et al. 2019, eq. 1-2)
    recall     a real picture lies in the ball of a drawn one
    density    in how many balls of real pictures a drawn one lies, over k         (Naeem et al. 2020, eq. 5)
    coverage   the ball of a real picture holds a drawn one                        (Naeem et al. 2020, eq. 6)

    Args:
        drawn, real: [N,D], [M,D], each of more than one.
        k: neighbors, itself not counted; fewer where there are not so many.
    Returns:
        float64 [N] or [M] each.
    """
    between = distances(drawn.double(), real.double(), "euclidean")  # (N, M)
    radius_real, radius_drawn = radius(real, k), radius(drawn, k)
    inside_real = between <= radius_real  # (N, M)
    inside_drawn = between <= radius_drawn[:, None]
    return {
        "precision": inside_real.any(1).double(),
        "recall": inside_drawn.any(0).double(),
        "density": inside_real.double().sum(1) / min(k, len(real) - 1),
        "coverage": inside_real.any(0).double(),
    }


def radius(vectors: Tensor, k: int) -> Tensor:
    """The distance of each vector [N,D] to its k-th nearest neighbor, float64 [N]."""
    vectors, k = vectors.double(), min(k, len(vectors) - 1) + 1  # the nearest is the vector itself
    parts = [distances(part, vectors, "euclidean").kthvalue(k, dim=1).values for part in vectors.split(256)]
    return torch.cat(parts)


def compare(drawn: Tensor, real: Tensor, count: int, fid_count: int = FID_RESAMPLES) -> dict[str, Any]:
    """All six figures of drawn against real vectors, with their intervals; `n` is how many values each averages."""
    figures: dict[str, Any] = {"fid": fid_figure(drawn, real, fid_count), "kid": kid_figure(drawn, real, count)}
    for name, values in neighborhood(drawn, real).items():
        figures[name] = mean_figure(values, count)
    return figures


def with_floor(drawn: Tensor, same: Tensor, reference: Tensor, count: int, fid_count: int) -> dict[str, Any]:
    """The figures of drawn pictures, and of the real ones that they stand for, against the same reference.

    Args:
        drawn: [N,D], pictures that the model drew for N captions.
        same: [N,D], the real pictures with these captions.
        reference: [M,D], other real pictures.
    """
    return {
        "n": len(drawn),
        "reference_n": len(reference),
        "neighbors": NEIGHBORS,
        "drawn": compare(drawn, reference, count, fid_count),
        "floor": compare(same, reference, count, fid_count),
    }
