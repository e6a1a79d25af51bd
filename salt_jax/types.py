"""Types and names of all public signatures, with the paper's symbols.

| paper                     | here                          | meaning                             |
|---------------------------|-------------------------------|-------------------------------------|
| t, s, t_s, t_m, t_e       | sigma, sigma_s, sigma_m, .._e | noise level, 0 to 1 (pure noise)    |
| x_t                       | x                             | latent at noise level sigma         |
| x_0                       | x0                            | clean latent                        |
| epsilon, z                | noise                         | standard Gaussian                   |
| v_theta                   | velocity                      | noise - x0, the slope dx / dsigma   |
| c                         | text                          | text embedding, padded rows are 0   |
| G_theta, s_phi (s_f), s_r | student, critic, teacher      | generator, its score, the real one  |
| Psi^{t->s}                | flow.transition.euler         | one Euler step                      |
| T^(K), T_train            | flow.schedule.grid(K)         | noise levels of K steps             |

Latents are `B F H W C` everywhere: batch, latent frames, latent height, latent width, channels.
"""

from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Key

Latent = Float[Array, "b f h w c"]
"""A batch of clips: clean, noisy or a velocity."""

Sigma = Float[Array, "b"] | Float[Array, "b f"]
"""Noise level, one per example or one per latent frame, in [0, 1]."""

TextEmb = Float[Array | np.ndarray, "b t d"]
"""Text embedding: T rows of the text encoder; rows past the end of the text are zero."""


class Conditioning(NamedTuple):
    """What a network is given with each clip."""

    text: TextEmb
    image: Float[Array | np.ndarray, "b n e"] | None = None
    """Of image to video: features of the image encoder, one row per patch of the picture."""
    channels: Float[Array | np.ndarray, "b f h w m"] | None = None
    """Of image to video, behind the noisy latent: which frames are known, and their latent."""


TokenIds = Int[Array, "b t"]
"""Token ids, padded with 0."""

PerExample = Float[Array, "b"]
"""What every loss returns: one float32 number per example."""

PRNGKey = Key[Array, ""]
"""A typed PRNG key (`jax.random.key`), used once."""

Leaf = Any
"""An array in a tree that also exists as shapes (`jax.eval_shape`), as shardings or as axes."""

Params = Any
"""A tree of nested dicts with arrays as leaves."""

Tree = TypeVar("Tree")
"""A tree of arrays, of a function that returns one of the same form."""


class Prediction(NamedTuple):
    """A denoiser's output for x at sigma: x0 = x - sigma * velocity."""

    velocity: Latent
    x0: Latent


@runtime_checkable
class Denoiser(Protocol):
    """A network, or a formula, that predicts the clean latent. A static value: jit keys on it."""

    def denoise(self, params: Params, x: Latent, sigma: Sigma, cond: Conditioning) -> Prediction:
        """Pure: all state is in `params`."""
        ...
