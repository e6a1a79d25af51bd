"""The sizes of a network in files of others: from array shapes, and from its config.json where
shapes do not determine them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.files import AnyPath
from salt_jax.io.model_folder import Sizes
from salt_jax.models import image_encoder, presets
from salt_jax.models.image_encoder import ImageEncoderConfig
from salt_jax.models.presets import WanConfig
from salt_jax.models.text_encoder import TextEncoderConfig
from salt_jax.models.vae import VAEConfig

PARTS: dict[str, model_folder.Part] = {
    "wan": model_folder.WAN,
    "vae": model_folder.VAE,
    "text_encoder": model_folder.TEXT,
    "image_encoder": model_folder.IMAGE,
}

CHANNELS = 16  # of Wan 2.1's latents
# Of other models: channels made, channels taken, whether there is an image embedding.
OTHERS = {
    (48, 48, False): "Wan 2.2 TI2V 5B",
    (16, 36, False): "Wan 2.2 I2V A14B",
    (16, 48, True): "Wan 2.1 Fun Control",
}


class Size(NamedTuple):
    """Of an array in every layer."""

    layers: int
    theirs: tuple[int, ...]
    ours: tuple[int, ...]  # empty where theirs cannot be made into ours


def read_json(path: AnyPath) -> dict[str, object]:
    """The JSON object in a file; empty where there is none."""
    try:
        stated = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}


def infer_config(
    network: str, sizes: Mapping[str, Size], stated: Mapping[str, object], where: str
) -> Sizes:
    """The config of a network of `PARTS`.

    Args:
      sizes: by our path.
      stated: what the config.json beside the file says.

    Raises:
      UserError: no config has these shapes, or they do not tell it all.
    """
    infer = {
        "wan": _wan,
        "vae": _vae,
        "text_encoder": _text_encoder,
        "image_encoder": _image_encoder,
    }
    try:
        return infer[network](sizes, stated, where)
    except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
        raise UserError(
            f"{where} has shapes that no {network} has ({error}); name another file"
        ) from error


def _wan(sizes: Mapping[str, Size], stated: Mapping[str, object], where: str) -> WanConfig:
    layers, _, (_, dim) = sizes["blocks/modulation"]
    _, channels, frames, rows, columns = sizes["patch_embedding/kernel"].theirs
    known = {c.dim: c.num_heads for c in presets.PRESETS.values() if c.text_dim == 4096}
    image = sizes.get("image_embedding/norm_in/scale")
    config = WanConfig(
        dim=dim,
        num_heads=_heads(stated, ("num_heads", "num_attention_heads"), known.get(dim), where),
        num_layers=layers,
        ffn_dim=sizes["blocks/ffn_in/kernel"].ours[1],
        in_channels=channels,
        out_channels=sizes["head/linear/bias"].ours[0] // (frames * rows * columns),
        patch_size=(frames, rows, columns),
        text_dim=sizes["text_embedding/in/kernel"].ours[0],
        text_length=int(_number(stated, "text_len", 512)),
        freq_dim=sizes["time_embedding/in/kernel"].ours[0],
        image_dim=image.ours[0] if image else 0,
        eps=float(_number(stated, "eps", 1e-6)),
    )
    _check_channels(config, where)
    return config


def _number(stated: Mapping[str, object], key: str, usual: float | int) -> float | int:
    value = stated.get(key, usual)
    if not isinstance(value, float | int):
        raise ValueError(f"its config.json says {key} {value!r}")
    return value


def _check_channels(config: WanConfig, where: str) -> None:
    made, taken = config.out_channels, config.in_channels
    if made == CHANNELS and taken == CHANNELS + config.condition_channels:
        return
    picture = "with" if config.image_dim else "without"
    other = OTHERS.get((made, taken, bool(config.image_dim)))
    guess = f", as {other} does" if other else ""
    raise UserError(
        f"{where} makes {made} channels of {taken}, {picture} an image embedding{guess}; "
        f"Wan 2.1 makes {CHANNELS} of {CHANNELS}, or of 36 with one: name another file"
    )


def _vae(sizes: Mapping[str, Size], stated: Mapping[str, object], where: str) -> VAEConfig:
    return VAEConfig(sizes["encoder/conv_in/bias"].ours[0], sizes["from_latent/bias"].ours[0])


def _text_encoder(
    sizes: Mapping[str, Size], stated: Mapping[str, object], where: str
) -> TextEncoderConfig:
    layers, _, (buckets, heads) = sizes["blocks/relative_attention_bias/embedding"]
    vocabulary, dim = sizes["shared/embedding"].ours
    width, ffn = (sizes[f"blocks/{name}/kernel"].ours[1] for name in ("q", "wi_0"))
    return TextEncoderConfig(vocabulary, dim, layers, heads, width // heads, ffn, buckets)


def _image_encoder(
    sizes: Mapping[str, Size], stated: Mapping[str, object], where: str
) -> ImageEncoderConfig:
    rows, dim = sizes["position_embedding"].ours
    layers, _, (_, mlp) = sizes["blocks/fc_in/kernel"]
    patch = sizes["patch_embedding/kernel"].ours[0]
    published = image_encoder.PRESETS["vit-h-14"]
    # The official release keeps it in one folder with the transformer, whose config.json tells
    # other heads.
    known = published.num_heads if dim == published.dim else None
    heads = known or _heads(stated, ("num_attention_heads",), None, where)
    return ImageEncoderConfig(dim, layers, heads, mlp, math.isqrt(rows - 1) * patch, patch)


def _heads(stated: Mapping[str, object], keys: Sequence[str], known: int | None, where: str) -> int:
    said = (stated.get(key) for key in keys)
    value = next((count for count in said if isinstance(count, int)), known)
    if not value:
        raise UserError(
            f"{where} is of a size not published, and shapes do not tell the number of heads; put "
            "a config.json with "
            f"{keys[0]} beside it"
        )
    return value
