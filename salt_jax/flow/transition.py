"""Moves from one noise level to the next: Euler (Salt Eq. 5), consistency-style re-noising, and the
two endpoints that the self-consistency loss compares (Salt Eq. 6-7)."""

from salt_jax.flow.prediction import add_noise, expand
from salt_jax.types import Latent, Sigma


def euler(x: Latent, velocity: Latent, sigma: Sigma, sigma_next: Sigma) -> Latent:
    """Psi^{t->s}(x) = x - (t - s) v(x, t), Salt Eq. 5.

    With sigma_next = 0 it is the x0 prediction.
    """
    return x - expand(sigma - sigma_next, x) * velocity


def renoise(x0: Latent, noise: Latent, sigma_next: Sigma) -> Latent:
    """The CM solver's move: forget x, noise the clean estimate afresh to sigma_next."""
    return add_noise(x0, noise, sigma_next)


def direct_endpoint(x_s: Latent, v_s: Latent, sigma_s: Sigma, sigma_e: Sigma) -> Latent:
    """x^(1) of Salt Eq. 6: one step from sigma_s to sigma_e."""
    return euler(x_s, v_s, sigma_s, sigma_e)


def composed_endpoint(
    x_s: Latent, v_s: Latent, v_m: Latent, sigma_s: Sigma, sigma_m: Sigma, sigma_e: Sigma
) -> Latent:
    """x^(2) of Salt Eq. 7: two steps, sigma_s -> sigma_m -> sigma_e. `v_m` is the velocity at
    euler(x_s, v_s, sigma_s, sigma_m)."""
    return euler(euler(x_s, v_s, sigma_s, sigma_m), v_m, sigma_m, sigma_e)
