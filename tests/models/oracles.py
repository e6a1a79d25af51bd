"""Small networks of diffusers and transformers, and their weights as our trees."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.image_encoder import ImageEncoderConfig
from salt_jax.models.text_encoder import TextEncoderConfig
from salt_jax.models.vae import init_vae
from tests.helpers import shapes_of


def from_diffusers(state):
    """AutoencoderKLWan's state dict -> our tree. Reads every tensor once."""
    state = {name: np.asarray(w) for name, w in state.items()}

    def conv(name):
        kernel = state.pop(name + ".weight")
        return {
            "kernel": kernel.transpose(*range(2, kernel.ndim), 1, 0),
            "bias": state.pop(name + ".bias"),
        }

    norm = lambda name: {"scale": state.pop(name + ".gamma").reshape(-1)}

    def res(name):
        parts = {f"{part}{i}": read(f"{name}.{part}{i}") for i in "12" for part, read in _NORM_CONV}
        shortcut = f"{name}.conv_shortcut"
        return parts | ({"shortcut": conv(shortcut)} if shortcut + ".weight" in state else {})

    def sampler(name):
        time = (
            {"time_conv": conv(name + ".time_conv")} if name + ".time_conv.weight" in state else {}
        )
        return {"conv": conv(name + ".resample.1")} | time

    def middle(name):
        attention = name + ".attentions.0."
        return {
            "res_in": res(name + ".resnets.0"),
            "attention": {
                "norm": norm(attention + "norm"),
                "qkv": conv(attention + "to_qkv"),
                "proj": conv(attention + "proj"),
            },
            "res_out": res(name + ".resnets.1"),
        }

    _NORM_CONV = (("norm", norm), ("conv", conv))
    down = {i: (sampler if i in (2, 5, 8) else res)(f"encoder.down_blocks.{i}") for i in range(11)}
    names = [f"{level}.resnets.{i}" for level in range(4) for i in range(3)]
    for place, level in ((3, 0), (7, 1), (11, 2)):
        names.insert(place, f"{level}.upsamplers.0")
    up = {
        i: (sampler if "upsamplers" in n else res)(f"decoder.up_blocks.{n}")
        for i, n in enumerate(names)
    }
    tree: Any = {"to_moments": conv("quant_conv"), "from_latent": conv("post_quant_conv")}
    for part, key, blocks in (("encoder", "down", down), ("decoder", "up", up)):
        tree[part] = {
            "conv_in": conv(f"{part}.conv_in"),
            key: {str(i): block for i, block in blocks.items()},
            "middle": middle(f"{part}.mid_block"),
            "norm_out": norm(f"{part}.norm_out"),
            "conv_out": conv(f"{part}.conv_out"),
        }
    assert not state, f"tensors without a place: {sorted(state)}"
    return tree


def make_oracle(config, **kwargs):
    """A diffusers VAE with every weight random, and the same weights as our tree."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.AutoencoderKLWan(**kwargs).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, w in module.named_parameters():
        # in full width, 0.08 would make all else vanish beside the residual branches
        std = 0.02 if config.dim > 8 else 0.05 if "decoder.conv_out" in name else 0.08
        w.copy_(("gamma" in name) + std * torch.randn(w.shape, generator=generator))
    params = from_diffusers(module.state_dict())
    fresh = shapes_of(config, init_vae)
    chex.assert_trees_all_equal_shapes(params, fresh)
    return module, jax.tree.map(jnp.asarray, params)


CLIP = ImageEncoderConfig(
    dim=32, num_layers=3, num_heads=2, mlp_dim=64, image_size=42, patch_size=14
)


def clip_from_transformers(state, num_layers):
    """CLIPVisionModel's state dict -> our tree, `num_layers` of its layers.

    Reads every tensor once.
    """
    state = {name.removeprefix("vision_model."): w for name, w in state.items()}
    for name in [
        n for n in state if n.startswith(("post_layernorm.", f"encoder.layers.{num_layers}."))
    ]:
        del state[name]
    norm = lambda name: {"scale": state.pop(name + ".weight"), "bias": state.pop(name + ".bias")}
    dense = lambda name: {
        "kernel": state.pop(name + ".weight").T,
        "bias": state.pop(name + ".bias"),
    }
    parts = {"norm1": (norm, "layer_norm1"), "norm2": (norm, "layer_norm2")}
    parts |= {name: (dense, f"self_attn.{name}_proj") for name in "qkv"}
    parts |= {
        "o": (dense, "self_attn.out_proj"),
        "fc_in": (dense, "mlp.fc1"),
        "fc_out": (dense, "mlp.fc2"),
    }
    layers = [
        {ours: read(f"encoder.layers.{i}.{theirs}") for ours, (read, theirs) in parts.items()}
        for i in range(num_layers)
    ]
    tree = {
        "class_embedding": state.pop("embeddings.class_embedding"),
        "patch_embedding": {
            "kernel": state.pop("embeddings.patch_embedding.weight").transpose(2, 3, 1, 0)
        },
        "position_embedding": state.pop("embeddings.position_embedding.weight"),
        "norm_in": norm("pre_layrnorm"),
        "blocks": jax.tree.map(lambda *ws: np.stack(ws), *layers),
    }
    state.pop("embeddings.position_ids", None)  # a buffer of older versions
    assert not state, f"tensors without a place: {sorted(state)}"
    return tree


# `num_buckets` and `max_distance` are umT5's, so that a text of 160 tokens reaches the last bucket.
UMT5 = TextEncoderConfig(vocab_size=100, dim=32, num_layers=3, num_heads=4, head_dim=16, ffn_dim=48)


def random_tokens(lengths, width, seed=0):
    tokens = np.random.default_rng(seed).integers(2, UMT5.vocab_size, (len(lengths), width))
    return jnp.asarray(
        np.where(np.arange(width) < np.array(lengths)[:, None], tokens, 0), jnp.int32
    )


def clip_of_transformers():
    """A vision model of the sizes of `CLIP`, with the layer and the norm that we leave out."""
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, projection_dim=24, num_hidden_layers=4,
            num_attention_heads=2, image_size=42, patch_size=14, hidden_act="gelu",
            layer_norm_eps=1e-5,
        )
    ).eval()  # fmt: skip


def umt5_of_transformers():
    """An encoder of the sizes of `UMT5`."""
    transformers = pytest.importorskip("transformers")
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=100, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=4,
            dropout_rate=0.0, relative_attention_num_buckets=32,
            relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
