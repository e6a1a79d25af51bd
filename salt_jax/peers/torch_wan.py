"""Wan of diffusers in PyTorch: its transformer with weights of ours, the same chunk by chunk on a
KV cache, and its VAE.

diffusers has no causal rollout. The one here is its own blocks under attention processors of ours,
as Self-Forcing lays out its cache: one buffer a layer for the whole video, into which a chunk
writes its keys (already turned) and values at each evaluation, and of which it reads everything up
to its own end; the text's keys and values are made once a video. Attention is PyTorch's
`scaled_dot_product_attention`.
"""

from typing import Any

import jax
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from salt_jax.convert.names import VAE
from salt_jax.convert.writing import Transformer, stated_sizes, writers
from salt_jax.errors import UserError
from salt_jax.models.presets import WanConfig
from salt_jax.models.vae import MEAN, STD, VAEConfig
from salt_jax.peers import installed
from salt_jax.types import Params

torch, diffusers = installed("torch"), installed("diffusers")
attend = torch.nn.functional.scaled_dot_product_attention
# torch.Tensor and torch.nn.Module: a type checker need not have them installed
Tensor = Network = DType = Any
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_here() -> str:
    """PyTorch's name of the device that jax runs on.

    Raises:
      UserError: PyTorch does not have it.
    """
    kind = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if kind is None or (kind == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"jax runs on {jax.default_backend()}, where the installed PyTorch does not; install "
            "one that does, or set JAX_PLATFORMS=cpu"
        )
    return kind


def finish() -> None:
    """Returns when PyTorch's device has done everything it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_torch(x: object, device: str, dtype: DType = torch.float32) -> Tensor:
    """An array of numpy or jax."""
    return torch.tensor(np.array(x, np.float32)).to(device, dtype)


def channels_first(x: object, device: str) -> Tensor:
    """A latent clip [B, F, H, W, C] as [B, C, F, H, W], float32."""
    return to_torch(np.moveaxis(np.asarray(x), -1, 1), device)


def channels_last(x: Tensor) -> np.ndarray:
    """The inverse."""
    return np.moveaxis(x.detach().float().cpu().numpy(), 1, -1)


def wan_arrays(config: WanConfig, params: Params) -> dict[str, np.ndarray]:
    """A transformer's weights, or their gradients, under the names of diffusers."""
    tensors = writers(Transformer(config, params), "diffusers", None)
    return {
        name: np.concatenate([np.asarray(part, np.float32) for part in tensor.parts()])
        for name, tensor in tensors.items()
    }


def vae_arrays(params: Params) -> dict[str, np.ndarray]:
    """A VAE's weights under the names of diffusers."""
    flat = flatten_dict(params, sep="/")
    back = {row: " -> ".join(row.form.split(" -> ")[::-1]) for row in VAE}
    return {row.diffusers: rearrange(np.asarray(flat[row.ours]), back[row]) for row in VAE}


def load(network: Network, arrays: dict[str, np.ndarray], device: str, dtype: str) -> Network:
    """A network with these weights, in the types that diffusers loads them in: some stay in
    float32.
    """
    precise = getattr(network, "_keep_in_fp32_modules", None) or ()

    def kind(name: str) -> DType:
        return torch.float32 if set(precise) & set(name.split(".")) else DTYPES[dtype]

    tensors = {name: to_torch(array, device, kind(name)) for name, array in arrays.items()}
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.to(device).eval()


def wan(config: WanConfig, params: Params, device: str, dtype: str) -> Network:
    """diffusers' transformer with weights of ours."""
    sizes = {k: v for k, v in stated_sizes(config, "diffusers").items() if k[0] != "_"}
    with torch.device("meta"):
        network = diffusers.WanTransformer3DModel(**sizes)
    # its tables are no weights
    network.rope = diffusers.WanTransformer3DModel(**sizes | {"num_layers": 0}).rope
    return load(network, wan_arrays(config, params), device, dtype)


class VAEDecoder:
    """diffusers' VAE with weights of ours; it reads normalised latents, as ours does."""

    def __init__(self, config: VAEConfig, params: Params, device: str, dtype: str):
        vae = diffusers.AutoencoderKLWan(base_dim=config.dim, z_dim=config.z_dim)
        self.vae = load(vae, vae_arrays(params), device, dtype)
        self.mean, self.std = (
            to_torch(row, device)[None, :, None, None, None] for row in (MEAN, STD)
        )

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """[B, 16, F, h, w] -> frames [B, 3, 4F-3, 8h, 8w] in [-1, 1]."""
        return self.vae.decode((latents * self.std + self.mean).to(self.vae.dtype)).sample


class _OnCache:
    """Self attention of a chunk to everything up to its end; it writes its own keys and values.

    `rotary_emb` is (cosines, sines, the chunk's first token).
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values  # [B, A, tokens of the video, d]

    def __call__(self, attn, x, encoder_hidden_states, attention_mask, rotary_emb):
        cos, sin, start = rotary_emb
        q, k = (
            _turn(_heads(norm(to(x)), attn.heads), cos, sin)
            for norm, to in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        stop = start + x.shape[1]
        self.keys[:, :, start:stop] = k
        self.values[:, :, start:stop] = _heads(attn.to_v(x), attn.heads)
        out = attend(q, self.keys[:, :, :stop], self.values[:, :, :stop])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class _OnText:
    """Cross attention to keys and values that were made before."""

    def __init__(self, attn: Network, text: Tensor):
        self.keys = _heads(attn.norm_k(attn.to_k(text)), attn.heads)
        self.values = _heads(attn.to_v(text), attn.heads)

    def __call__(self, attn, x, encoder_hidden_states, attention_mask, rotary_emb):
        q = _heads(attn.norm_q(attn.to_q(x)), attn.heads)
        out = attend(q, self.keys, self.values)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of features turned by their angles, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class CausalRollout:
    """diffusers' transformer chunk by chunk. `network` is changed and belongs to it."""

    def __init__(self, network: Network, chunk: int, levels: np.ndarray):
        self.network, self.chunk = network, chunk
        self.levels = [float(sigma) for sigma in levels[:-1]]  # the last one is 0

    @torch.inference_mode()
    def __call__(self, noise: Tensor, text: Tensor) -> Tensor:
        """A video: at each level the clean estimate is noised again; then the chunk is read once
        more, clean, for those that follow.

        Args:
          noise: float32 [K, B, C, F, H, W], that of each level.
          text: [B, T, text_dim].
        """
        network, dtype = self.network, text.dtype
        frames, height, width = noise.shape[3:]
        tokens = height * width // (network.config.patch_size[1] * network.config.patch_size[2])
        text = network.condition_embedder.text_embedder(text)
        angles = [x[0, :, 0] for x in network.rope(noise[0])]
        cos, sin = angles[0][:, 0::2], angles[1][:, 1::2]
        for block in network.blocks:
            a = block.attn1
            shape = (len(text), a.heads, frames * tokens, a.inner_dim // a.heads)
            a.processor = _OnCache(*text.new_empty((2, *shape)))
            block.attn2.processor = _OnText(block.attn2, text)
        made = []
        for first in range(0, frames, self.chunk):
            at, last = slice(first * tokens, (first + self.chunk) * tokens), first + self.chunk
            rotary = (cos[at], sin[at], first * tokens)
            x0 = noise[0][:, :, first:last]
            for i, sigma in enumerate(self.levels):
                x = (1 - sigma) * x0 + sigma * noise[i][:, :, first:last]
                x0 = x - sigma * self._head(*self._tokens(x.to(dtype), sigma, rotary), x.shape)
            self._tokens(x0.to(dtype), 0.0, rotary)
            made.append(x0)
        return torch.cat(made, 2)

    def _tokens(self, x: Tensor, sigma: float, rotary: tuple) -> tuple[Tensor, Tensor]:
        """After the blocks, and the embedding of time."""
        network, embed = self.network, self.network.condition_embedder
        h = network.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        waves = embed.timesteps_proj(torch.full((len(x),), 1000 * sigma, device=x.device))
        time = embed.time_embedder(waves).type_as(x)
        e0 = embed.time_proj(embed.act_fn(time)).unflatten(1, (6, -1))
        for block in network.blocks:
            h = block(h, None, e0, rotary)
        return h, time

    def _head(self, h: Tensor, time: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The velocity, float32 [B, C, F, H, W]."""
        network, (pt, ph, pw) = self.network, self.network.config.patch_size
        shift, scale = (network.scale_shift_table + time[:, None]).chunk(2, 1)
        h = (network.norm_out(h.float()) * (1 + scale) + shift).type_as(h)
        form = "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)"
        sizes = dict(f=shape[2] // pt, h=shape[3] // ph, w=shape[4] // pw, pt=pt, ph=ph, pw=pw)
        return rearrange(network.proj_out(h), form, **sizes).float()
