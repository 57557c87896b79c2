"""Frechet distance between two Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500)."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), in float64.

    tr((C_a C_b)^(1/2)) is computed as the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2). This
    matrix is symmetric, so rank-deficient covariances (N < D) need no diagonal offset.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"features {a.shape} and {b.shape} do not match; give at least 2 rows and equal columns")
    a, b = a.astype(np.float64), b.astype(np.float64)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance_a))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ np.atleast_2d(covariance_b) @ root)
    difference = a.mean(0) - b.mean(0)
    trace = np.trace(np.atleast_2d(covariance_a)) + np.trace(np.atleast_2d(covariance_b))
    return float(difference @ difference + trace - 2 * np.sqrt(eigenvalues.clip(0)).sum())
