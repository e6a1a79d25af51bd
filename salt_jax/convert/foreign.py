"""What looks like Wan 2.1 and is not, by what is seen: names in a file, and what stands beside
it.
"""

import re
from collections.abc import Iterable, Sequence

from salt_jax.convert.sizes import read_json
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, in_bucket

# Names of arrays that neither text- nor image-to-video models of Wan 2.1 have, and whose they are.
FOREIGN = {
    r"(^|\.)vace_": "VACE",
    r"(^|\.)(control_adapter|ref_conv)\.": "Wan-Fun",
    r"(^|\.)img_emb\.emb_pos$|image_embedder\.pos_embed$": (
        "Wan 2.1 FLF2V, of a first and a last frame"
    ),
    r"to_gate_compress": "video sparse attention (VSA gate weights), as FastWan has",
    r"(^|\.)fps_(embedding|projection)\.": "SkyReels-V2",
    r"(^|\.)(casual_audio_encoder|audio_injector|frame_packer|cond_encoder|"
    r"trainable_cond_mask)\.": "Wan 2.2 S2V",
    r"(^|\.)(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.": "Wan 2.2 Animate",
    r"(^|\.)(audio_cross_attn|audio_proj|multitalk_audio_proj)\.": "MultiTalk or another of speech",
    r"(^|\.)(cam_encoder|cam_injector|projector)\.": "ReCamMaster, or another of camera paths",
    r"(^|\.)(en|de)coder\.(down|up)samples\.\d+\.(down|up)samples\.": "the VAE of Wan 2.2 TI2V 5B",
}
# Names that only quantised files have.
QUANTISED = {
    r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\.|\.SCB$": "bitsandbytes",
    r"\.(wscales|wtscale|smooth_factor(_orig)?|proj_down|wcscales)$": "SVDQuant (nunchaku)",
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.weight_scale_2$": "NVFP4",
    r"\.weight_scale_inv$": "fp8 in blocks",
    r"\.weight\.int8$|\.weight\._(data|scale)$|\.weight_packed$": "whole numbers",
}
KNOWN_TYPES = (None, "t2v", "i2v")  # model_type of the official config.json
KNOWN_CLASSES = (None, "WanModel", "CausalWanModel", "WanTransformer3DModel")
WAN_2_2 = re.compile(r"(high|low)[_-]?noise|wan2[._-]?2|(?<![a-z])a14b", re.IGNORECASE)


def foreign_by_names(names: Iterable[str]) -> str:
    """A sentence about names that show another model or a quantised one; "" where none does."""
    names = sorted(names)
    for table, sentence in (
        (QUANTISED, "is quantised as {what}"),
        (FOREIGN, "is not Wan 2.1 but of {what}"),
    ):
        for pattern, what in table.items():
            seen = [name for name in names if re.search(pattern, name)]
            if seen:
                more = f" and {len(seen) - 1} more like it" if seen[1:] else ""
                return f"{sentence.format(what=what)}: it has {seen[0]}{more}"
    return ""


def check_surroundings(files: Sequence[AnyPath]) -> None:
    """Refuses a transformer whose shapes are those of Wan 2.1 and whose folder says that it is
    another model.

    Raises:
      UserError: the name of the file or folder, a config.json or a model_index.json says so.
    """
    path = files[0] if in_bucket(files[0]) else files[0].absolute()
    around = [path.name, path.parent.name]
    around += [path.parent.parent.name] if path.parent.name.startswith("transformer") else []
    named = next((name for name in around if WAN_2_2.search(name)), "")
    if named:
        raise UserError(f"{files[0]} is of Wan 2.2, as the name {named} says; only Wan 2.1 is read")
    config = path.with_name("config.json")
    stated = read_json(config)
    for key, known in (("model_type", KNOWN_TYPES), ("_class_name", KNOWN_CLASSES)):
        if stated.get(key) not in known:
            raise UserError(
                f"{files[0]} is not Wan 2.1: {config} says {key} {stated[key]!r}; name another file"
            )
    for index in (path.with_name("model_index.json"), path.parent.with_name("model_index.json")):
        stated = read_json(index)
        second = stated.get("transformer_2") not in (None, [], [None, None])
        if second or stated.get("boundary_ratio") is not None:
            raise UserError(
                f"{files[0]} is one of two transformers of Wan 2.2, as {index} says; only Wan 2.1 "
                "is read"
            )
