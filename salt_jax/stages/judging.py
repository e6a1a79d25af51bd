"""How teacher and critic judge a video: one noised copy of it, at a level that is drawn."""

from typing import NamedTuple

import jax

from salt_jax.config.method import Renoise
from salt_jax.flow.draws import draw_renoise_sigma, nearest
from salt_jax.flow.prediction import add_noise, expand, from_velocity
from salt_jax.types import Conditioning, Denoiser, Latent, Params, Prediction, PRNGKey, Sigma


class Renoised(NamedTuple):
    """Noise and levels at which teacher and critic judge a video."""

    noise: Latent
    sigma: Sigma  # [B]


def draw_renoised(
    key: PRNGKey, shape: tuple[int, ...], r: Renoise, highest: float = 1.0
) -> Renoised:
    """`highest`: of u, before the shift."""
    k_sigma, k_noise = jax.random.split(key)
    sigma = draw_renoise_sigma(k_sigma, shape[0], r.shift, r.lowest, r.highest, highest)
    return Renoised(jax.random.normal(k_noise, shape), sigma)


class Judged(NamedTuple):
    """A video that teacher and critic judge. Nothing in it has a gradient."""

    x: Latent
    told: Sigma  # [B], the level that the networks are told
    sigma: Sigma  # its noise level
    # what is taken for it where a velocity becomes a clean estimate; None: the level itself
    taken: Sigma | None
    cond: Conditioning

    def by(self, network: Denoiser, params: Params) -> Prediction:
        """What teacher or critic says of it."""
        said = network.denoise(params, self.x, self.told, self.cond)
        if self.taken is None:
            return said
        velocity = said.velocity * expand(self.taken / self.sigma, self.x)
        return from_velocity(self.x, velocity, self.sigma)


def judged(x0: Latent, renoised: Renoised, cond: Conditioning, r: Renoise) -> Judged:
    """The three levels are one but for the peers' two tables (`renoise.score_shift`)."""
    sigma, taken = renoised.sigma, None
    if r.score_shift:
        sigma, taken = nearest(sigma, r.shift), nearest(sigma, r.score_shift)
    x = add_noise(jax.lax.stop_gradient(x0), renoised.noise, sigma)
    return Judged(x, renoised.sigma, sigma, taken, cond)
