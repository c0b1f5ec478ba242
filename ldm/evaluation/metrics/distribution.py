"""Do generated pictures, taken together, look like real ones? FID, KID, precision and recall, density and coverage.

Each metric compares two sets of feature vectors, and each depends on their size: FID falls with n for the very same
model. So none stands alone. Beside it stands the baseline: the same metric, at the same n, of real pictures that the
model has not trained on. A model whose pictures are as good as new pictures of the data set reaches the baseline.

The Fréchet distance and KID's kernel are torchmetrics'. Its KID wants two samples of one size and has no interval, and
no maintained library has density and coverage, so these are here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.metrics.intervals import bootstrap_estimate, mean_estimate, resample_indices
from ldm.evaluation.metrics.retrieval import distances

NEIGHBORS = 5  # Naeem et al. 2020, section 4
FID_RESAMPLES = 50


class _Identity(torch.nn.Module):
    """Returns vectors unchanged, for metrics that expect pictures and a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(generated: Tensor, real: Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of vectors [N,D] and [M,D] (Heusel et al. 2017, eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Identity(generated.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def project_to_span(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in an orthonormal basis of their common span, in which every distance and the FID are the same.

    A few hundred vectors of 2,048 dimensions span a few hundred; the matrix square root costs the cube of that.
    """
    together = torch.cat([generated, real]).double()
    if len(together) >= together.shape[1]:
        return generated.double(), real.double()
    centered = together - together.mean(0)
    basis = torch.linalg.qr(centered.T)[0]  # (D, N + M)
    projected = centered @ basis
    return projected[: len(generated)], projected[len(generated) :]


def fid_estimate(generated: Tensor, real: Tensor, resamples: int = FID_RESAMPLES) -> dict[str, Any]:
    """FID, with an interval over the choice of the generated pictures."""
    generated, real = project_to_span(generated, real)
    indices = resample_indices(len(generated), resamples)
    resampled = torch.tensor([fid(generated[chosen], real) for chosen in indices])
    return bootstrap_estimate(fid(generated, real), resampled, len(generated))


def kid_estimate(generated: Tensor, real: Tensor, resamples: int) -> dict[str, Any]:
    """The unbiased squared MMD with the kernel (x y / D + 1)^3 (Bińkowski et al. 2018, eq. 4), with an interval.

    The interval is over the choice of the generated pictures.
    """
    value, resampled = _resampled_kid(generated, real, resamples)
    return bootstrap_estimate(value, resampled, len(generated))


def kid_difference(a: Tensor, b: Tensor, real: Tensor, resamples: int) -> dict[str, Any]:
    """KID of b minus KID of a, vectors [N,D] of the same N prompts; each resample takes the same prompts of both."""
    (first, of_a), (second, of_b) = (_resampled_kid(each, real, resamples) for each in (a, b))
    return {"a": first, "b": second, **bootstrap_estimate(second - first, of_b - of_a, len(a))}


def _resampled_kid(generated: Tensor, real: Tensor, resamples: int) -> tuple[float, Tensor]:
    """KID, and KID of bootstrap samples of the generated pictures, [resamples].

    A resample may hold a picture twice; such a pair is left out, like i = j in the estimator, or its kernel would bias
    the resampled estimates upwards.
    """
    from torchmetrics.image.kid import poly_kernel

    generated, real = generated.double(), real.double()
    within, between = poly_kernel(generated, generated), poly_kernel(generated, real)
    n, m = len(generated), len(real)
    kernel_real = poly_kernel(real, real)
    among_real = (kernel_real.sum() - kernel_real.trace()) / (m * (m - 1))
    within.fill_diagonal_(0.0)

    def estimate(weights: Tensor) -> Tensor:
        """weights [R,n]: how often each generated picture counts => [R]."""
        pairs = (weights.sum(1) ** 2 - weights.square().sum(1)).clamp(min=1)
        among_generated = ((weights @ within) * weights).sum(1) / pairs
        return among_generated + among_real - 2 * (weights @ between.mean(1)) / weights.sum(1)

    counts = torch.zeros(resamples, n, dtype=torch.float64)
    counts.scatter_add_(1, resample_indices(n, resamples), torch.ones(resamples, n, dtype=torch.float64))
    return float(estimate(torch.ones(1, n, dtype=torch.float64))), estimate(counts)


def neighborhood_metrics(generated: Tensor, real: Tensor, k: int = NEIGHBORS) -> dict[str, Tensor]:
    """Precision, recall, density, coverage, each as the values whose mean it is: one per generated or real picture.

    precision  a generated picture lies in the k-nearest-neighbor ball of a real one (Kynkäänniemi et al. 2019, eq. 1-2)
    recall     a real picture lies in the ball of a generated one
    density    number of real pictures' balls that hold a generated one, over k      (Naeem et al. 2020, eq. 5)
    coverage   the ball of a real picture holds a generated one                      (Naeem et al. 2020, eq. 6)

    Args:
        generated, real: [N,D], [M,D], each of more than one.
        k: neighbors, the vector itself not counted; fewer if there are not so many.
    Returns:
        float64 [N] or [M] each.
    """
    between = distances(generated.double(), real.double(), "euclidean")  # (N, M)
    inside_real = between <= neighbor_radius(real, k)  # (N, M)
    inside_generated = between <= neighbor_radius(generated, k)[:, None]
    return {
        "precision": inside_real.any(1).double(),
        "recall": inside_generated.any(0).double(),
        "density": inside_real.double().sum(1) / min(k, len(real) - 1),
        "coverage": inside_real.any(0).double(),
    }


def neighbor_radius(vectors: Tensor, k: int) -> Tensor:
    """The distance of each vector [N,D] to its k-th nearest neighbor, float64 [N]."""
    vectors, k = vectors.double(), min(k, len(vectors) - 1) + 1  # the nearest is the vector itself
    parts = [distances(part, vectors, "euclidean").kthvalue(k, dim=1).values for part in vectors.split(256)]
    return torch.cat(parts)


def all_metrics(generated: Tensor, real: Tensor, resamples: int, fid_resamples: int = FID_RESAMPLES) -> dict[str, Any]:
    """All six estimates of generated against real vectors; `n` is how many values each averages."""
    estimates: dict[str, Any] = {
        "fid": fid_estimate(generated, real, fid_resamples),
        "kid": kid_estimate(generated, real, resamples),
    }
    for name, values in neighborhood_metrics(generated, real).items():
        estimates[name] = mean_estimate(values, resamples)
    return estimates


def with_baseline(
    generated: Tensor, real: Tensor, reference: Tensor, resamples: int, fid_resamples: int
) -> dict[str, Any]:
    """The metrics of generated pictures, and of the real ones in their place, against the same reference.

    Args:
        generated: [N,D], of N prompts.
        real: [N,D], the real pictures with these captions.
        reference: [M,D], other real pictures.
    """
    return {
        "n": len(generated),
        "reference_n": len(reference),
        "neighbors": NEIGHBORS,
        "drawn": all_metrics(generated, reference, resamples, fid_resamples),
        "floor": all_metrics(real, reference, resamples, fid_resamples),
    }
