"""What is timed beside diffusers: the same weights, inputs and types, one part at a time.

    forward     one evaluation of the transformer on one clip
    gradient    the same, and the gradient of the mean square of its output by all weights
    rollout     a video chunk by chunk on a KV cache, from its prompt's embedding to its latents
    decode      the first chunk's latents to pixels

Weights are in the type of the products. diffusers then keeps tokens between blocks in that type
too, ours are in `model.residual`. Without `model.remat` neither side recomputes, but ours has
a second variant that makes everything but products again; with it diffusers checkpoints its blocks.
Ours draws its noise within the rollout, diffusers is given it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.vae import VAEConfig, decode_video, init_vae
from salt_jax.models.wan import Inputs, apply_wan, init_wan
from salt_jax.peers import torch_wan as theirs
from salt_jax.peers.turns import Part, Side
from salt_jax.planning.bench import random_cond, shapes_of
from salt_jax.planning.random_params import random_params
from salt_jax.rollout.parallel import noise_at
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate
from salt_jax.stages.networks import denoiser_of
from salt_jax.types import Params

PEER = "diffusers"
TIMESTEP = 500.0


class Work(NamedTuple):
    """What both sides are given."""

    recipe: Recipe
    vae: VAEConfig | None  # None: the recipe's latents are not Wan's
    num_steps: int  # of a chunk
    compiled: bool  # also diffusers under torch.compile
    device: str  # PyTorch's name of it

    @property
    def dtype(self) -> str:
        """Of products and weights."""
        return np.dtype(self.recipe.compute.dtype).name

    def params(self) -> Params:
        """The transformer's."""
        r = self.recipe
        return random_params(shapes_of(init_wan, r.wan), r.compute.dtype, r.seed)

    def clip(self) -> jax.Array:
        """Noise, [1, F, H, W, C]."""
        return jax.random.normal(jax.random.key(self.recipe.seed), (1, *self.recipe.clip_shape))

    def both(self, side: Callable[[bool], Side]) -> Part:
        """The peer's variants, of a function that makes the one that is compiled or not."""
        part = {PEER: side(False)}
        return part | ({f"{PEER}, compiled": side(True)} if self.compiled else {})


def parts(work: Work) -> dict[str, Callable[[], Part]]:
    """By name what can be timed of a recipe, not made yet."""
    made = {"forward": forward, "gradient": gradient}
    made |= {"rollout": rollout} if work.recipe.causal else {}
    made |= {"decode": decode} if work.vae else {}
    return {name: partial(part, work) for name, part in made.items()}


def _evaluation(work: Work) -> tuple[Params, Callable[[Params, WanDenoiser], jax.Array], tuple]:
    """Our weights, our velocity, and the inputs of diffusers' network."""
    cond, x, device = random_cond(work.recipe, 1), work.clip(), work.device
    timestep = jnp.full(1, TIMESTEP)

    def velocity(params: Params, network: WanDenoiser) -> jax.Array:
        return apply_wan(params, Inputs(x, timestep, cond), network.config, network.compute)

    dtype = theirs.DTYPES[work.dtype]
    given = (
        theirs.channels_first(x, device).to(dtype),
        theirs.to_torch(timestep, device),
        theirs.to_torch(cond.text, device, dtype),
    )
    return work.params(), velocity, given


def forward(work: Work) -> Part:
    """See above; without gradient."""
    params, velocity, given = _evaluation(work)
    mine = denoiser_of(work.recipe, None)
    ours = jax.jit(lambda p: velocity(p, mine))

    def peer(compiled: bool) -> Side:
        network = theirs.wan(work.recipe.wan, params, work.device, work.dtype)
        if compiled:
            network.compile_repeated_blocks()

        def run():
            with theirs.torch.inference_mode():
                out = network(*given).sample
            theirs.finish()
            return out

        return Side(run, lambda out: {"velocity": theirs.channels_last(out)})

    return {"ours": _of_jax(lambda: ours(params), "velocity")} | work.both(peer)


def gradient(work: Work) -> Part:
    """See above."""
    params, velocity, given = _evaluation(work)
    network, remat = denoiser_of(work.recipe, None), work.recipe.compute.remat

    def ours(how) -> Side:
        mine = replace(network, compute=replace(network.compute, remat=how))
        made = jax.jit(jax.grad(lambda p: jnp.square(velocity(p, mine)).mean()))
        return Side(
            lambda: jax.block_until_ready(made(params)),
            partial(theirs.wan_arrays, work.recipe.wan),
        )

    def peer(compiled: bool) -> Side:
        network = theirs.wan(work.recipe.wan, params, work.device, work.dtype)
        if remat != "none":
            network.enable_gradient_checkpointing()
        if compiled:
            network.compile_repeated_blocks()

        def run():
            network.zero_grad()
            network(*given).sample.float().square().mean().backward()
            theirs.finish()
            return {name: p.grad for name, p in network.named_parameters()}

        return Side(run, lambda out: {k: g.float().cpu().numpy() for k, g in out.items()})

    hows = [remat] if remat != "none" else ["none", "dots_no_batch"]
    return {f"ours, remat {how}": ours(how) for how in hows} | work.both(peer)


def rollout(work: Work) -> Part:
    """See above; the KV cache forgets nothing.

    Raises:
      UserError: the recipe's does.
    """
    recipe, device = work.recipe, work.device
    policy, cond, (frames, *picture) = recipe.memory, random_cond(recipe, 1), recipe.clip_shape
    if policy.window or policy.positions != "absolute" or policy.first != policy.chunk:
        raise UserError(
            "the rollout beside diffusers is of equal chunks that see everything before them; set "
            "config.memory.window=0, .first=0 and .positions=absolute"
        )
    sampler = Sampler(work.num_steps, recipe.schedule.shift, "cm", policy)
    levels, keys, params = sampler.grid(), clip_keys(recipe.seed, 1), work.params()
    cues, network = {0: Cue(jax.tree.map(np.asarray, cond))}, denoiser_of(recipe, None)
    policy.sizes(frames)  # refuses what does not split

    def ours() -> np.ndarray:
        made = generate(sampler, network, params, cues, keys, recipe.clip_shape)
        return np.concatenate(list(made), 1)

    numbers = np.arange(frames)
    noise = [noise_at(keys, jnp.float32(s), numbers, tuple(picture)) for s in levels[:-1]]
    given = (
        theirs.torch.stack([theirs.channels_first(x, device) for x in noise]),
        theirs.to_torch(cond.text, device, theirs.DTYPES[work.dtype]),
    )

    def peer(compiled: bool) -> Side:
        network = theirs.wan(recipe.wan, params, device, work.dtype)
        if compiled:
            network.compile_repeated_blocks()
        made = theirs.CausalRollout(network, policy.chunk, levels)

        def run():
            out = made(*given)
            theirs.finish()
            return out

        return Side(run, lambda out: {"latents": theirs.channels_last(out)})

    return {"ours": _of_jax(ours, "latents")} | work.both(peer)


def decode(work: Work) -> Part:
    """See above."""
    recipe, config = work.recipe, work.vae
    assert config, "a recipe with Wan's latents"
    dtype = recipe.compute.dtype
    params = random_params(shapes_of(init_vae, config), dtype, recipe.seed)
    latents = work.clip()[:, : recipe.memory.chunk]
    ours = jax.jit(partial(decode_video, config=config, dtype=dtype))
    given = theirs.channels_first(latents, work.device)

    def peer(compiled: bool) -> Side:
        network = theirs.VAEDecoder(config, params, work.device, work.dtype)
        if compiled:
            network.vae.decoder.compile()

        def run():
            out = network(given)
            theirs.finish()
            return out

        return Side(run, lambda out: {"pixels": theirs.channels_last(out)})

    return {"ours": _of_jax(lambda: ours(params, latents), "pixels")} | work.both(peer)


def _of_jax(run: Callable[[], jax.Array | np.ndarray], name: str) -> Side:
    """A side of ours whose result is one array."""
    return Side(
        lambda: jax.block_until_ready(run()), lambda out: {name: np.asarray(out, np.float32)}
    )
