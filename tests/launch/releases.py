"""Releases of Wan 2.1 as others publish them, small and random."""

import json

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from salt_jax.models import image_encoder, text_encoder, vae
from salt_jax.models.wan import init_wan
from tests.convert.networks import from_table, official, save_torch
from tests.helpers import randomised, shapes_of, to_diffusers

# What a run of a small network on small encoded clips is given, of one iteration
ONE_ITERATION = [
    "--config.text_encoder=wan-tiny",
    "--config.model.dtype=float32",
    "--config.data.clip=(3,4,4)",
    "--config.batch_size=2",
    "--config.iterations=1",
    "--config.critic_ratio=1",
    "--config.mesh.fsdp=1",
]


def release(folder, layout, config):
    """A release in one of the two layouts: Wan's networks, small and random, and a tokenizer of one
    word a token.
    """
    parts = {"wan": (config, init_wan), "vae": (vae.PRESETS["tiny"], vae.init_vae)}
    parts["text_encoder"] = (text_encoder.PRESETS["wan-tiny"], text_encoder.init_text_encoder)
    if config.image_dim:
        parts["image_encoder"] = (image_encoder.PRESETS["tiny"], image_encoder.init_image_encoder)
    places = {
        "wan": "transformer",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "image_encoder": "image_encoder",
    }
    for name, (sizes, init) in parts.items():
        tree = randomised(shapes_of(sizes, init), 1)
        if name == "image_encoder":  # a file has one layer more than is used
            tree["blocks"] = jax.tree.map(
                lambda leaf: np.concatenate([leaf, leaf[:1]]), tree["blocks"]
            )
        place = folder / (places[name] if layout == "diffusers" else "")
        place.mkdir(parents=True, exist_ok=True)
        told = {"num_heads": 2, "num_attention_heads": 2}
        (place / "config.json").write_text(json.dumps(told))
        if name == "wan":
            by_hand = official(tree, sizes) if layout == "official" else to_diffusers(tree, sizes)
            tensors = {name: np.asarray(w) for name, w in by_hand.items()}
        else:
            tensors = from_table(name, layout, tree)
        if layout == "diffusers" or name == "wan":
            save_file(tensors, place / "model.safetensors")
        else:
            save_torch(place / f"{name}.pth", tensors)
    words = ["<pad>", "</s>", "<s>", "<unk>", "A", "cat", "dog", "walks", "runs", ".", "Noise"]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    place = folder / ("tokenizer" if layout == "diffusers" else "google/umt5-xxl")
    place.mkdir(parents=True)
    model.save(str(place / "tokenizer.json"))
    return folder
