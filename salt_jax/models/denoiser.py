"""Networks as denoisers: the only place that turns sigma into Wan's timestep.

A denoiser is a frozen value without parameters, so jit keys on what it is: two equal ones share
their programs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from salt_jax.flow.prediction import from_velocity, guide
from salt_jax.models import wan
from salt_jax.models.blocks import CrossKV
from salt_jax.models.kv_cache import KVCache
from salt_jax.models.layout import lay_cache
from salt_jax.models.position_channels import POSITION_CHANNELS, PositionChannels
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.visibility import AttentionPlan, KeysValues
from salt_jax.types import Conditioning, Denoiser, Latent, Params, Prediction, Sigma, TextEmb


class GuidedParams(NamedTuple):
    """Parameters of `Guided`."""

    network: Params
    null_text: TextEmb  # [1, T, D], what guidance leads away from


class Branches(NamedTuple):
    """The conditioning of `Guided` once it is read: the prompt's, and the null text's."""

    prompt: CrossKV
    null: CrossKV


Cond = Conditioning | CrossKV | Branches
"""Conditioning as it comes, or as `WanDenoiser.read` or `Guided.read` returned it."""


@dataclass(frozen=True)
class WanDenoiser:
    """Wan with its input and output in float32 whatever `compute.dtype` is.

    An image-to-video network gets `Conditioning.channels` behind the latent, and works whole clips.

    Raises:
      ValueError: the network reads more channels than a latent has, and none are given.
    """

    config: WanConfig
    compute: Compute
    position: PositionChannels | None = None  # behind the latent of the small presets

    def __post_init__(self):
        more = self.config.in_channels - self.config.out_channels
        given = POSITION_CHANNELS if self.position else self.config.condition_channels
        if more != given:
            raise ValueError(
                f"{more} additional input channels; a condition has "
                f"{self.config.condition_channels}, position channels are {POSITION_CHANNELS}"
            )

    def denoise(
        self,
        params: Params,
        x: Latent,
        sigma: Sigma,
        cond: Cond,
        plan: AttentionPlan | None = None,
    ) -> Prediction:
        """The prediction at x [B, F, H, W, C]; `plan` None: every frame sees every frame."""
        seen = self._inputs(x, 1000.0 * sigma, cond, plan)
        velocity = wan.apply_wan(params, seen, self.config, self.compute)
        return from_velocity(x, velocity, sigma)

    def keys_values(
        self, params: Params, x0: Latent, cond: Cond, plan: AttentionPlan
    ) -> KeysValues:
        """Keys and values of clean frames, as a cache stores them."""
        clean = jnp.zeros(x0.shape[:1])
        return wan.keys_values(
            params, self._inputs(x0, clean, cond, plan), self.config, self.compute
        )

    def denoise_and_keep(
        self, params: Params, x: Latent, sigma: Sigma, cond: Cond, plan: AttentionPlan
    ) -> tuple[Prediction, KeysValues]:
        """`denoise`, and the keys and values of x at that level, as a cache stores them."""
        seen = self._inputs(x, 1000.0 * sigma, cond, plan)
        velocity, kept = wan.apply_and_keep(params, seen, self.config, self.compute)
        return from_velocity(x, velocity, sigma), kept

    def features(
        self, params: Params, x: Latent, sigma: Sigma, cond: Conditioning, layers: int
    ) -> Float[Array, "b f s d"]:
        """The tokens after the first `layers` blocks."""
        seen = self._inputs(x, 1000.0 * sigma, cond, None)
        return wan.features(params, seen, self.config, self.compute, layers)

    def read(self, params: Params, cond: Conditioning) -> CrossKV:
        """Keys and values of `cond`, accepted in its place in all calls under one prompt."""
        return wan.cross_keys_values(params, cond, self.config, self.compute)

    def empty_cache(self, clips: int, slots: int, picture: tuple[int, ...]) -> KVCache:
        """Of `clips` videos; `picture` is (H, W, C) of a latent frame."""
        c, (height, width, _) = self.config, picture
        tokens = (height // c.patch_size[1]) * (width // c.patch_size[2])
        shape = (c.num_layers, clips, slots, tokens, c.num_heads, c.head_width)
        zeros = lay_cache(jnp.zeros(shape, self.compute.dtype), self.compute.mesh)
        x0 = jnp.zeros((clips, slots, *picture))
        none = jnp.zeros((), jnp.int32)
        return KVCache(zeros, zeros, x0, jnp.zeros(slots, jnp.int32), none, none)

    def _inputs(
        self, x: Latent, timestep: Sigma, cond: Cond, plan: AttentionPlan | None
    ) -> wan.Inputs:
        assert not isinstance(cond, Branches), "conditioning of a guided network"
        if self.position:
            numbers = plan.frames if plan else np.arange(x.shape[1])
            channels = self.position.of(numbers, *x.shape[2:4])
            shape = (*x.shape[:4], channels.shape[-1])
            x = jnp.concatenate([x, jnp.broadcast_to(channels, shape)], axis=-1)
        elif isinstance(cond, Conditioning) and cond.channels is not None:
            x = jnp.concatenate([x, cond.channels], axis=-1)
        return wan.Inputs(x, timestep, cond, plan)


def wan_denoiser(config: WanConfig, compute: Compute, frames: int, chunk: int) -> WanDenoiser:
    """A denoiser with position channels for clips of `frames` where the network reads them."""
    reads = config.in_channels > config.out_channels and not config.image_dim
    return WanDenoiser(config, compute, PositionChannels(frames, chunk) if reads else None)


@dataclass(frozen=True)
class Guided:
    """A denoiser under classifier-free guidance, u + w (c - u).

    A picture stays what it is; the text alone is nulled. Two evaluations a call, as the peers do:
    their memory then peaks at one batch, not at two. Each branch has a history of its own: caches
    hold the keys and values of the prompt's branch and then those of the null text's on the batch
    axis, so a chunk's conditional velocity sees earlier chunks as read under the prompt, its
    unconditional one as read under the null text.
    """

    network: Denoiser  # a WanDenoiser where it is asked for more than `denoise`
    guidance: float

    def denoise(
        self,
        params: GuidedParams,
        x: Latent,
        sigma: Sigma,
        cond: Cond,
        plan: AttentionPlan | None = None,
    ) -> Prediction:
        if plan is None:
            given, null = (
                self.network.denoise(params.network, x, sigma, c) for c in _both(params, cond)
            )
        else:
            given, null = (
                self._wan.denoise(params.network, x, sigma, c, p)
                for c, p in zip(_both(params, cond), _halves(plan), strict=True)
            )
        return guide(given, null, self.guidance)

    def keys_values(
        self,
        params: GuidedParams,
        x0: Latent,
        cond: Cond,
        plan: AttentionPlan,
    ) -> KeysValues:
        return _joined(
            self._wan.keys_values(params.network, x0, c, p)
            for c, p in zip(_both(params, cond), _halves(plan), strict=True)
        )

    def denoise_and_keep(
        self, params: GuidedParams, x: Latent, sigma: Sigma, cond: Cond, plan: AttentionPlan
    ) -> tuple[Prediction, KeysValues]:
        (given, first), (null, second) = (
            self._wan.denoise_and_keep(params.network, x, sigma, c, p)
            for c, p in zip(_both(params, cond), _halves(plan), strict=True)
        )
        return guide(given, null, self.guidance), _joined((first, second))

    def read(self, params: GuidedParams, cond: Conditioning) -> Branches:
        return Branches(*(self._wan.read(params.network, c) for c in _both(params, cond)))

    def empty_cache(self, clips: int, slots: int, picture: tuple[int, ...]) -> KVCache:
        cache = self._wan.empty_cache(clips, slots, picture)
        return replace(cache, k=cache.k.repeat(2, axis=1), v=cache.v.repeat(2, axis=1))

    @property
    def _wan(self) -> WanDenoiser:
        assert isinstance(self.network, WanDenoiser), "a formula has no cache"
        return self.network


CausalDenoiser = WanDenoiser | Guided
"""What works chunk by chunk."""


def _both(params: GuidedParams, cond: Cond) -> tuple:
    """The conditioning of the two branches."""
    if isinstance(cond, Branches):
        return cond
    assert isinstance(cond, Conditioning), "conditioning of a network without guidance"
    null = params.null_text.repeat(len(cond.text), axis=0)
    return cond, cond._replace(text=null)


def _joined(parts: Iterable[KeysValues]) -> KeysValues:
    """Of both branches, as a cache holds them."""
    return KeysValues(*(jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True)))


def _halves(plan: AttentionPlan) -> tuple[AttentionPlan, AttentionPlan]:
    """A plan over both branches' memory as one for each."""
    if plan.memory is None:
        return plan, plan
    halves = zip(*(jnp.split(part, 2, axis=1) for part in plan.memory), strict=True)
    first, second = (plan._replace(memory=KeysValues(*half)) for half in halves)
    return first, second


def guided(
    network: Denoiser, params: Params, null_text: TextEmb, guidance: float
) -> tuple[Denoiser, Params]:
    """A denoiser and its parameters under classifier-free guidance; guidance 1 is none."""
    if guidance == 1.0:
        return network, params
    return Guided(network, guidance), GuidedParams(params, null_text)
