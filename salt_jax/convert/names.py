"""How the files of others name what our trees hold: the official Wan 2.1 release, and the Diffusers
layout.

One row for each array. `{i}` counts layers: ours are stacked on a leading axis, theirs are apart.
`form`, an einops pattern, makes ours of theirs. Sources: Wan-Video/Wan2.1,
diffusers 0.42, transformers 5.23.
"""

from typing import NamedTuple

SAME = "... -> ..."
LINEAR = "o i -> i o"
ONE = "1 ... -> ..."  # a table that is broadcast over the batch there
# a convolution whose stride is its kernel, as one matrix product
PATCH = "d c pt ph pw -> (c pt ph pw) d"
CONV2 = "o i h w -> h w i o"
CONV3 = "o i t h w -> t h w i o"
GAIN2, GAIN3 = "c 1 1 -> c", "c 1 1 1 -> c"


class Row(NamedTuple):
    """One array.

    `official_form` where the two layouts differ in shape. `#k`: the k-th third of their rows.
    """

    ours: str
    official: str
    diffusers: str
    form: str
    official_form: str = ""


def _pairs(table: str, kernel: str, bias: str = SAME, gain: str = "kernel") -> tuple[Row, ...]:
    """Lines of "ours official diffusers", each a weight and a bias; `gain` is what ours calls the
    weight.
    """
    rows = []
    for line in table.strip().splitlines():
        ours, official, diffusers = line.split()
        for mine, theirs, form in ((gain, "weight", kernel), ("bias", "bias", bias)):
            if form:
                rows.append(
                    Row(f"{ours}/{mine}", f"{official}.{theirs}", f"{diffusers}.{theirs}", form)
                )
    return tuple(rows)


def _gains(table: str) -> tuple[Row, ...]:
    return _pairs(table, SAME, "", "scale")


WAN = (
    *_pairs("patch_embedding patch_embedding patch_embedding", PATCH),
    *_pairs(
        """
        time_embedding/in         time_embedding.0  condition_embedder.time_embedder.linear_1
        time_embedding/out        time_embedding.2  condition_embedder.time_embedder.linear_2
        time_embedding/projection time_projection.1 condition_embedder.time_proj
        text_embedding/in         text_embedding.0  condition_embedder.text_embedder.linear_1
        text_embedding/out        text_embedding.2  condition_embedder.text_embedder.linear_2
        image_embedding/in        img_emb.proj.1    condition_embedder.image_embedder.ff.net.0.proj
        image_embedding/out       img_emb.proj.3    condition_embedder.image_embedder.ff.net.2
        blocks/self_attn/q        blocks.{i}.self_attn.q      blocks.{i}.attn1.to_q
        blocks/self_attn/k        blocks.{i}.self_attn.k      blocks.{i}.attn1.to_k
        blocks/self_attn/v        blocks.{i}.self_attn.v      blocks.{i}.attn1.to_v
        blocks/self_attn/o        blocks.{i}.self_attn.o      blocks.{i}.attn1.to_out.0
        blocks/cross_attn/q       blocks.{i}.cross_attn.q     blocks.{i}.attn2.to_q
        blocks/cross_attn/k       blocks.{i}.cross_attn.k     blocks.{i}.attn2.to_k
        blocks/cross_attn/v       blocks.{i}.cross_attn.v     blocks.{i}.attn2.to_v
        blocks/cross_attn/o       blocks.{i}.cross_attn.o     blocks.{i}.attn2.to_out.0
        blocks/cross_attn/k_img   blocks.{i}.cross_attn.k_img blocks.{i}.attn2.add_k_proj
        blocks/cross_attn/v_img   blocks.{i}.cross_attn.v_img blocks.{i}.attn2.add_v_proj
        blocks/ffn_in             blocks.{i}.ffn.0            blocks.{i}.ffn.net.0.proj
        blocks/ffn_out            blocks.{i}.ffn.2            blocks.{i}.ffn.net.2
        head/linear               head.head                 proj_out
        """,
        LINEAR,
    ),
    # The norm before cross attention is the third one there, the second one in Diffusers.
    *_pairs(
        """
        blocks/norm_cross        blocks.{i}.norm3 blocks.{i}.norm2
        image_embedding/norm_in  img_emb.proj.0   condition_embedder.image_embedder.norm1
        image_embedding/norm_out img_emb.proj.4   condition_embedder.image_embedder.norm2
        """,
        SAME,
        gain="scale",
    ),
    *_gains(
        """
        blocks/self_attn/norm_q      blocks.{i}.self_attn.norm_q      blocks.{i}.attn1.norm_q
        blocks/self_attn/norm_k      blocks.{i}.self_attn.norm_k      blocks.{i}.attn1.norm_k
        blocks/cross_attn/norm_q     blocks.{i}.cross_attn.norm_q     blocks.{i}.attn2.norm_q
        blocks/cross_attn/norm_k     blocks.{i}.cross_attn.norm_k     blocks.{i}.attn2.norm_k
        blocks/cross_attn/norm_k_img blocks.{i}.cross_attn.norm_k_img blocks.{i}.attn2.norm_added_k
        """
    ),
    Row("blocks/modulation", "blocks.{i}.modulation", "blocks.{i}.scale_shift_table", ONE),
    Row("head/modulation", "head.modulation", "scale_shift_table", ONE),
)

TEXT_ENCODER = (
    Row("shared/embedding", "token_embedding.weight", "shared.weight", SAME),
    *_gains(
        """
        blocks/attention_layer_norm blocks.{i}.norm1 encoder.block.{i}.layer.0.layer_norm
        blocks/ffn_layer_norm       blocks.{i}.norm2 encoder.block.{i}.layer.1.layer_norm
        final_layer_norm            norm             encoder.final_layer_norm
        """
    ),
    *_pairs(
        """
        blocks/q    blocks.{i}.attn.q     encoder.block.{i}.layer.0.SelfAttention.q
        blocks/k    blocks.{i}.attn.k     encoder.block.{i}.layer.0.SelfAttention.k
        blocks/v    blocks.{i}.attn.v     encoder.block.{i}.layer.0.SelfAttention.v
        blocks/o    blocks.{i}.attn.o     encoder.block.{i}.layer.0.SelfAttention.o
        blocks/wi_0 blocks.{i}.ffn.gate.0 encoder.block.{i}.layer.1.DenseReluDense.wi_0
        blocks/wi_1 blocks.{i}.ffn.fc1    encoder.block.{i}.layer.1.DenseReluDense.wi_1
        blocks/wo   blocks.{i}.ffn.fc2    encoder.block.{i}.layer.1.DenseReluDense.wo
        """,
        LINEAR,
        "",
    ),
    Row(
        "blocks/relative_attention_bias/embedding",
        "blocks.{i}.pos_embedding.embedding.weight",
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
        SAME,
    ),
)

_LAYER, _THEIRS = "visual.transformer.{i}", "encoder.layers.{i}"
IMAGE_ENCODER = (
    Row(
        "class_embedding",
        "visual.cls_embedding",
        "embeddings.class_embedding",
        SAME,
        "1 1 d -> d",
    ),
    Row(
        "patch_embedding/kernel",
        "visual.patch_embedding.weight",
        "embeddings.patch_embedding.weight",
        CONV2,
    ),
    Row(
        "position_embedding",
        "visual.pos_embedding",
        "embeddings.position_embedding.weight",
        SAME,
        "1 n d -> n d",
    ),
    *_pairs("norm_in visual.pre_norm pre_layrnorm", SAME, gain="scale"),
    *_pairs(f"blocks/norm1 {_LAYER}.norm1 {_THEIRS}.layer_norm1", SAME, gain="scale"),
    *_pairs(f"blocks/norm2 {_LAYER}.norm2 {_THEIRS}.layer_norm2", SAME, gain="scale"),
    *(
        Row(
            f"blocks/{ours}/{mine}",
            f"{_LAYER}.attn.to_qkv.{theirs}#{k}",
            f"{_THEIRS}.self_attn.{ours}_proj.{theirs}",
            form,
        )
        for k, ours in enumerate("qkv")
        for mine, theirs, form in (("kernel", "weight", LINEAR), ("bias", "bias", SAME))
    ),
    *_pairs(
        f"""
        blocks/o      {_LAYER}.attn.proj {_THEIRS}.self_attn.out_proj
        blocks/fc_in  {_LAYER}.mlp.0     {_THEIRS}.mlp.fc1
        blocks/fc_out {_LAYER}.mlp.2     {_THEIRS}.mlp.fc2
        """,
        LINEAR,
    ),
)


def _residual(ours: str, official: str, diffusers: str, shortcut: bool) -> tuple[Row, ...]:
    pieces = (("conv1", "residual.2", "conv1"), ("conv2", "residual.6", "conv2"))
    pieces += (("shortcut", "shortcut", "conv_shortcut"),) if shortcut else ()
    norms = [
        Row(
            f"{ours}/norm{k}/scale",
            f"{official}.residual.{there}.gamma",
            f"{diffusers}.norm{k}.gamma",
            GAIN3,
        )
        for k, there in ((1, 0), (2, 3))
    ]
    lines = "\n".join(f"{ours}/{a} {official}.{b} {diffusers}.{c}" for a, b, c in pieces)
    return (*norms, *_pairs(lines, CONV3))


def _sampler(ours: str, official: str, diffusers: str, in_time: bool) -> tuple[Row, ...]:
    time = f"{ours}/time_conv {official}.time_conv {diffusers}.time_conv"
    conv = _pairs(f"{ours}/conv {official}.resample.1 {diffusers}.resample.1", CONV2)
    return (*conv, *_pairs(time, CONV3)) if in_time else conv


def _coder(x: str) -> tuple[Row, ...]:
    """What encoder and decoder share: the first convolution, the middle and the head."""
    attention, there = f"{x}/middle/attention", f"{x}.mid_block.attentions.0"
    return (
        *_pairs(f"{x}/conv_in {x}.conv1 {x}.conv_in\n{x}/conv_out {x}.head.2 {x}.conv_out", CONV3),
        Row(f"{x}/norm_out/scale", f"{x}.head.0.gamma", f"{x}.norm_out.gamma", GAIN3),
        *_residual(f"{x}/middle/res_in", f"{x}.middle.0", f"{x}.mid_block.resnets.0", False),
        *_residual(f"{x}/middle/res_out", f"{x}.middle.2", f"{x}.mid_block.resnets.1", False),
        Row(f"{attention}/norm/scale", f"{x}.middle.1.norm.gamma", f"{there}.norm.gamma", GAIN2),
        *_pairs(f"{attention}/qkv {x}.middle.1.to_qkv {there}.to_qkv", CONV2),
        *_pairs(f"{attention}/proj {x}.middle.1.proj {there}.proj", CONV2),
    )


_DOWN = [
    (f"encoder/down/{i}", f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}", i)
    for i in range(11)
]
# The decoder is flat there too; Diffusers groups it by resolution: three residual blocks, then what
# samples up.
_UP = [
    (f"decoder/up/{i}", f"decoder.upsamples.{i}", f"decoder.up_blocks.{i // 4}", i, i % 4)
    for i in range(15)
]
VAE = (
    *_coder("encoder"),
    *_coder("decoder"),
    *_pairs("to_moments conv1 quant_conv\nfrom_latent conv2 post_quant_conv", CONV3),
    *(row for a, b, c, i in _DOWN if i not in (2, 5, 8) for row in _residual(a, b, c, i in (3, 6))),
    *(row for a, b, c, i in _DOWN if i in (2, 5, 8) for row in _sampler(a, b, c, i > 2)),
    *(row for a, b, c, i, j in _UP if j < 3 for row in _residual(a, b, f"{c}.resnets.{j}", i == 4)),
    *(
        row
        for a, b, c, i, j in _UP
        if j == 3
        for row in _sampler(a, b, f"{c}.upsamplers.0", i < 11)
    ),
)

TABLES = {"wan": WAN, "vae": VAE, "text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER}

# Arrays that only image-to-video models have.
IMAGE_TO_VIDEO = r"image_embedding/|_img/"

# Wrappers of training between the parts of names.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

# What a training keeps several networks of one kind under: the first of these that is there is the
# student's.
STUDENTS = (
    "generator_ema", "ema_generator", "student_ema", "ema_student", "ema", "generator_lora",
    "generator", "student", "model", "module", "state_dict", "net",
)  # fmt: skip
AVERAGE = r"(^|_)ema(_|$)"  # in the name of any other average
# Networks that only help to train it.
HELPERS = r"critic|fake|real_score|teacher|discriminator|optimizer"

# The tokenizer in a text encoder of ComfyUI, as bytes.
TOKENIZER = "spiece_model"

# The same array under a second name.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}

# Layers at the end that Wan does not run.
UNUSED_LAYERS = {"wan": 0, "vae": 0, "text_encoder": 0, "image_encoder": 1}

# What files hold beside what is used, as regular expressions of whole names; `LAST` is an unused
# layer.
IGNORED = {
    "wan": r"blocks\.\d+\.attn2\.norm_added_q\.weight",
    "vae": r"(?!)",
    "text_encoder": r"spiece_model",
    "image_encoder": r"textual\..*|text_model\..*|(log|logit)_scale"
    r"|visual\.head|(visual|text)_projection\.weight"
    r"|visual\.post_norm\..*|post_layernorm\..*|embeddings\.position_ids"
    r"|(visual\.transformer|encoder\.layers)\.LAST\..*",
}
