"""Files as people have them: 8-bit numbers, wrappers, suffixes and neighbours; and models that are
not Wan 2.1.
"""

import argparse
import json
import pickle
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from salt_jax.convert import reading, writing
from salt_jax.convert.folder import find_networks
from salt_jax.convert.fp8 import rescaled
from salt_jax.convert.reading import find_network
from salt_jax.convert.writing import Transformer, write_official
from salt_jax.errors import UserError
from salt_jax.io.header import read_metadata
from salt_jax.io.tensor_files import view
from salt_jax.models import image_encoder, text_encoder, vae
from salt_jax.models.presets import PRESETS
from tests.convert.networks import I2V, T2V, come_in, from_table, official, save_torch, slow
from tests.convert.pickles import (
    archive,
    call,
    group,
    name,
    number,
    ordered,
    storage,
    table,
    tensor,
    text,
)
from tests.helpers import randomised, same_bits, shapes_of

PARAMS = {config: randomised(shapes_of(config), 1) for config in (T2V, I2V)}
ones = lambda *shape: np.ones(shape, np.float32)
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def good(config=T2V):
    return official(PARAMS[config], config)


def save(folder, tensors, file="x.safetensors", metadata=None, told='{"num_heads": 2}'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(told)
    save_file(tensors, folder / file, metadata)
    return folder / file


def refused(told, path, **more):
    with pytest.raises(UserError, match=told) as error:
        find_networks(path, lambda path: None, **more)
    assert str(path.name) in str(error.value) or str(path.parent) in str(error.value)
    assert len(str(error.value)) < 1200 and "\n" not in str(error.value)


# Numbers of 8 bits.


def in_8_bits(tensors, dtype, scale=None, suffix="scale_weight", shape=()):
    """ComfyUI's: matrices of the blocks as 8 bits, with a scale beside each; and the values that
    they stand for.
    """
    out, values = {}, {}
    for k, (key, w) in enumerate(tensors.items()):
        values[key] = w
        if not (key.startswith("blocks.") and w.ndim == 2):
            out[key] = w
            continue
        out[key] = w.astype(dtype)
        values[key] = out[key].astype(np.float32)
        if scale:
            sizes = shape(w) if callable(shape) else shape
            beside = np.array(scale * np.random.default_rng(k).uniform(1, 2, sizes), np.float32)
            out[f"{key.removesuffix('weight')}{suffix}"] = beside
            if beside.ndim < 3:
                values[key] = values[key] * beside.reshape(-1, 1)
            else:
                parts = np.split(values[key], beside.shape[1], axis=1)
                scaled = [part * beside[:, b] for b, part in enumerate(parts)]
                values[key] = np.concatenate(scaled, axis=1)
    return out, values


def matrices(tree):
    return {
        key: leaf
        for key, leaf in flatten_dict(tree, sep="/").items()
        if key.startswith("blocks/") and "kernel" in key
    }


@pytest.mark.parametrize("dtype", [E4M3, slow(E5M2)])
def test_plain_fp8_is_exact_in_bfloat16(tmp_path, dtype):
    """All 256 patterns of bits are numbers of bfloat16; those of the file come out as they are."""
    bits = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(bits.astype(ml_dtypes.bfloat16).astype(np.float32), bits)
    tensors, values = in_8_bits(good(), dtype)
    _, tree = come_in([save(tmp_path, tensors)], tmp_path)
    assert {leaf.dtype for leaf in matrices(tree).values()} == {jnp.dtype(jnp.bfloat16)}
    assert tree["head"]["linear"]["kernel"].dtype == jnp.float32
    got = official({k: _float32(v) for k, v in tree.items()}, T2V)
    same_bits(got, values)


def _float32(tree):
    return (
        {k: _float32(v) for k, v in tree.items()}
        if isinstance(tree, dict)
        else np.asarray(tree, np.float32)
    )


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [
        ("scale_weight", ()),
        slow("weight_scale", (1,)),
        slow("scale_weight", (1, 1)),
        ("weight_scale", lambda w: (len(w),)),
        ("weight_scale", lambda w: (len(w), 1)),
        ("scale_weight", lambda w: (len(w), 4, 1)),
    ],
)
def test_scaled_fp8_is_the_product_in_float32(tmp_path, suffix, shape):
    tensors, values = in_8_bits(good(), E4M3, 0.01, suffix, shape)
    for key in list(tensors):
        if key.endswith(suffix):
            layer = key.removesuffix(suffix)
            tensors[f"{layer}scale_input"] = tensors[f"{layer}input_scale"] = 7 * ones(1)
            tensors[f"{layer}comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    tensors["scaled_fp8"] = np.zeros(2, E4M3)
    front = "model.diffusion_model."
    metadata = {
        "_quantization_metadata": json.dumps({"layers": {"x": {"format": "float8_e4m3fn"}}})
    }
    file = save(tmp_path, {front + key: w for key, w in tensors.items()}, metadata=metadata)
    _, tree = come_in([file], tmp_path)
    assert {leaf.dtype for leaf in matrices(tree).values()} == {jnp.dtype(jnp.float32)}
    got = official(_float32(tree), T2V)
    for key, want in values.items():
        np.testing.assert_allclose(got[key], want, rtol=1e-6, err_msg=key)
    _, tree = come_in([file], tmp_path, jnp.bfloat16)
    want = np.float32(values["blocks.1.ffn.0.weight"].T).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(tree["blocks"]["ffn_in"]["kernel"][1]), want)


def test_a_scale_for_each_block_of_a_row():
    weight = np.float32([[1, 2, 3, 4], [5, 6, 7, 8]])
    scale = np.float32([[[2], [10]], [[3], [100]]])
    np.testing.assert_array_equal(rescaled(weight, scale), [[2, 4, 30, 40], [15, 18, 700, 800]])


def test_fp8_of_torch_comes_in(tmp_path):
    """A tensor of 8 bits that torch.save wrote, as a matrix of the network would be: dtype and
    numbers.
    """
    tensors, values = in_8_bits(good(), E4M3)
    body = {
        key: fp8_tensor(k, w) if w.dtype == E4M3 else None
        for k, (key, w) in enumerate(tensors.items())
    }
    plain = {key: w for key, w in tensors.items() if w.dtype != E4M3}
    data = {str(k): w.tobytes() for k, w in enumerate(tensors.values()) if w.dtype == E4M3}
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    archive(tmp_path / "a-00001-of-00002.bin", table({k: v for k, v in body.items() if v}), data)
    save_torch(tmp_path / "a-00002-of-00002.bin", plain)
    files = sorted(tmp_path.glob("*.bin"))
    _, tree = come_in(files, tmp_path)
    same_bits(official(_float32(tree), T2V), values)
    networks = find_networks(tmp_path, lambda path: None)  # also by folder, shards of .bin together
    assert networks["wan"].files == tuple(files)


def fp8_tensor(key, w):
    where = group(
        text("storage"),
        name("torch.storage", "UntypedStorage"),
        text(str(key)),
        text("cpu"),
        number(w.size),
    )
    lengths = lambda numbers: group(*map(number, numbers))
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v3")
    rest = (
        number(0),
        lengths(w.shape),
        lengths((w.shape[1], 1)),
        b"\x89",
        hooks,
        name("torch", "float8_e4m3fn"),
    )
    return call(rebuild, where + b"Q", *rest)


def test_float64_is_stored_as_float32(tmp_path):
    tensors = {key: w.astype(np.float64) + 1e-9 for key, w in good().items()}
    _, tree = come_in([save(tmp_path, tensors)], tmp_path)
    same_bits(
        official(_float32(tree), T2V), {key: w.astype(np.float32) for key, w in tensors.items()}
    )
    assert tree["head"]["modulation"].dtype == jnp.float32


Q, EIGHT = "blocks.0.self_attn.q", np.zeros((48, 48), E4M3)
as_bytes = lambda told: {f"{Q}.comfy_quant": np.frombuffer(told, np.uint8)}
QUANTISED = {
    "int8": ({f"{Q}.weight": np.zeros((48, 48), np.int8)},
             "q.weight is int8, no floating point: quantised"),
    "int8 with a scale": ({f"{Q}.weight": np.zeros((48, 48), np.int8),
                           f"{Q}.weight_scale": ones(1)},
                          "scale beside .*q.weight, which is int8, no fp8"),
    "bitsandbytes": ({f"{Q}.weight.absmax": ones(4), f"{Q}.weight.quant_map": ones(16)},
                     "quantised as bitsandbytes"),
    "nunchaku": ({f"{Q}.qweight": np.zeros(4, np.int8), f"{Q}.wscales": ones(4)},
                 "quantised as SVDQuant"),
    "gptq": ({f"{Q}.qweight": np.zeros(4, np.int32), f"{Q}.qzeros": np.zeros(4, np.int32)},
             "quantised as GPTQ or AWQ"),
    "nvfp4": ({f"{Q}.weight": np.zeros((48, 48), np.uint8), f"{Q}.weight_scale_2": ones(1)},
              "quantised as NVFP4"),
    "blocks": ({f"{Q}.weight_scale_inv": ones(1, 1)}, "fp8 in blocks"),
    "quanto": ({f"{Q}.weight._data": np.zeros(4, np.int8)}, "whole numbers"),
    "comfy_quant": (as_bytes(b'{"format": "int8_tensorwise"}'), "as int8_tensorwise"),
    "comfy_quant with more": (as_bytes(b'{"format": "float8_e4m3fn", "convrot": true}'),
                              "as float8_e4m3fn"),
    "comfy_quant damaged": (as_bytes(b"\xff\xfe"), "an unknown kind of numbers"),
    "scale of bfloat16": ({f"{Q}.scale_weight": ones(1)},
                          "scale beside .*q.weight, which is float32"),
    "scale of another shape": ({f"{Q}.weight": EIGHT, f"{Q}.scale_weight": ones(47)},
                               r"its scale \(47,\)"),
    "scale of columns": ({f"{Q}.weight": EIGHT, f"{Q}.scale_weight": ones(1, 48)},
                         r"its scale \(1, 48\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_other_quantised_files_are_named(tmp_path, kind):
    more, told = QUANTISED[kind]
    refused(told, save(tmp_path, good() | more))


def test_umt5_of_comfyui_brings_its_tokenizer(tmp_path):
    config = text_encoder.PRESETS["wan-tiny"]
    tree = randomised(shapes_of(config, text_encoder.init_text_encoder), 1)
    tensors = {
        key: w.astype(np.float16)
        for key, w in from_table("text_encoder", "diffusers", tree).items()
    }
    tensors |= {"spiece_model": np.frombuffer(b"umT5", np.uint8), "scaled_fp8": np.zeros(0, E4M3)}
    for front in ("", "text_encoders.umt5xxl.transformer."):
        found = find_network([save(tmp_path, {front + key: w for key, w in tensors.items()})])
        assert found.network == "text_encoder" and view(found.tokenizer).tobytes() == b"umT5"
    _, got = come_in([save(tmp_path, tensors)], tmp_path)
    same_bits(got, _map(lambda w: w.astype(np.float16), tree))


def _map(f, tree):
    return {k: _map(f, v) for k, v in tree.items()} if isinstance(tree, dict) else f(tree)


def test_a_checkpoint_of_comfyui_holds_several_networks(tmp_path):
    """One file with the transformer, the VAE, umT5 and CLIP, each behind its own prefix, of which
    CLIP has more.
    """
    trees = {
        "vae.": ("vae", vae.PRESETS["tiny"], vae.init_vae, "official"),
        "text_encoders.umt5xxl.transformer.": (
            "text_encoder", text_encoder.PRESETS["wan-tiny"],
            text_encoder.init_text_encoder, "diffusers",
        ),
        "clip_vision.vision_model.": (
            "image_encoder", image_encoder.PRESETS["tiny"],
            image_encoder.init_image_encoder, "diffusers",
        ),
    }  # fmt: skip
    tensors = {f"model.diffusion_model.{key}": w for key, w in good().items()}
    for front, (network, config, init, layout) in trees.items():
        arrays = from_table(network, layout, randomised(shapes_of(config, init), 1))
        if network == "image_encoder":  # the layer that Wan does not run
            last = {n.replace(".1.", ".2.", 1): w for n, w in arrays.items() if ".layers.1." in n}
            arrays |= last | {"post_layernorm.weight": ones(40)}
        tensors |= {front + key: w for key, w in arrays.items()}
    tensors["clip_vision.visual_projection.weight"] = ones(3, 3)
    file = save(tmp_path, tensors, told='{"num_heads": 2, "num_attention_heads": 2}')
    found = find_networks(file, lambda path: None)
    assert set(found) == {"wan", "vae", "text_encoder", "image_encoder"}
    assert {one.student for one in found.values()} == {""} and found["wan"].config == T2V


# What stands in front of names, and in which dict.

FRONTS = (
    "net.", "dit.", "pipe.dit.", "generator.", "student.", "model.", "model.diffusion_model.",
    "module.", "a.b.c.", "_orig_mod.", "module._orig_mod.", "model._fsdp_wrapped_module.",
    "state_dict.net.module.",
)  # fmt: skip


@pytest.mark.parametrize("front", FRONTS)
def test_any_one_prefix_is_taken_off(tmp_path, front):
    found, tree = come_in([save(tmp_path, {front + key: w for key, w in good().items()})], tmp_path)
    assert (found.student, found.config) == ("", T2V)
    same_bits(tree, PARAMS[T2V])


bad = lambda: {key: 0 * w for key, w in good().items()}
under = lambda front, tensors: {front + key: w for key, w in tensors.items()}
NESTED = {
    "state_dict": lambda: {"state_dict": good(), "epoch": np.int64([3])},
    "module": lambda: {"module": under("module.", good())},
    "ema": lambda: {"ema": good(), "model": bad()},
    "generator_ema": lambda: {"generator_ema": good(), "ema": bad(), "generator": bad(),
                              "critic": bad()},
    "student": lambda: {"student": good(), "teacher": bad(), "fake_score": bad(),
                        "real_score": bad()},
    "params_ema": lambda: {"params_ema": good(), "params": bad()},
    "ema/generator": lambda: {"ema": {"generator": good()}, "model": {"generator": bad()}},
    "state_dict/generator": lambda: {
        "state_dict": under("generator.", good()) | under("critic.", bad()),
    },
    "a/b/c": lambda: {"a": {"b": {"c": good()}}},
    "model": lambda: {
        "model": good(), "discriminator": {"conv.weight": ones(3, 3)},
        "optimizer": {"state": {"0": {"exp_avg": ones(3)},
                                "blocks.0.ffn.0.weight": {"exp_avg": ones(3)}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", NESTED)
def test_the_network_in_a_dict_of_dicts_is_found(tmp_path, kind):
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    file = save_torch(tmp_path / "x.ckpt", NESTED[kind]())
    found, tree = come_in([file], tmp_path)
    assert found.student == kind
    same_bits(tree, PARAMS[T2V])


def test_a_flat_file_with_two_networks_gives_the_student(tmp_path):
    tensors = (
        under("generator.model.", good())
        | under("fake_score.model.", bad())
        | under("real_score.", bad())
    )
    found, tree = come_in([save(tmp_path, tensors)], tmp_path)
    assert found.student == "generator.model"
    same_bits(tree, PARAMS[T2V])
    tensors = good() | under("critic.", bad()) | {"step": np.int64([3])}
    same_bits(come_in([save(tmp_path, tensors)], tmp_path)[1], PARAMS[T2V])


def test_key_chooses_another_network_of_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    file = save_torch(
        tmp_path / "x.pt", {"generator_ema": bad(), "generator": good(), "critic": bad()}
    )
    for key, zero in (("", True), ("generator_ema", True), ("generator", False), ("critic", True)):
        found = find_networks(file, lambda path: None, key)["wan"]
        assert found.student == (key or "generator_ema")
        assert (not view(found.pieces["head/linear/bias"][0].stored).any()) == zero
    refused("has no network under --key=ema; there is generator_ema", file, key="ema")
    flat = save(tmp_path, under("a.", good()) | under("b.", bad()))
    refused("may be what stands under a, b; choose with --key", flat)
    same_bits(official_of(find_networks(flat, lambda path: None, "a")["wan"]), good())
    alone = save_torch(tmp_path / "y.pt", {"critic": good()})
    refused("may be what stands under critic; choose with --key", alone)
    assert find_networks(alone, lambda path: None, "critic")["wan"].student == "critic"


def official_of(found):
    arrays = {
        key: np.stack(list(out.parts())) if key.startswith("blocks/") else next(iter(out.parts()))
        for key, out in reading.writers(found, None).items()
    }
    return official(unflatten_dict(arrays, sep="/"), T2V)


def test_numpy_scalars_and_configs_beside_the_weights_do_no_harm(tmp_path):
    """As trainings of the Self Forcing family, Lightning and Megatron save them."""
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    tensors, data, body = good(), {}, {}
    for k, (key, w) in enumerate(tensors.items()):
        data[str(k)] = w.tobytes()
        strides = [int(np.prod(w.shape[i + 1 :])) for i in range(w.ndim)]
        body[key] = tensor(storage("Float", str(k), w.size), 0, w.shape, strides)
    beside = {
        "loss": np.float64(0.1),
        "args": argparse.Namespace(lr=1e-4, step=np.int64(3)),
        "names": {"a"},
    }
    pickled = table({"net": ordered(body)}) + text("beside") + pickle.dumps(beside, 2)[2:-1] + b"s"
    found, tree = come_in([archive(tmp_path / "x.ckpt", pickled, data)], tmp_path)
    assert found.student == "net"
    same_bits(tree, PARAMS[T2V])


def test_what_was_seen_is_told_where_nothing_matches(tmp_path):
    names = {f"layers.{i:03d}.weight": ones(1) for i in range(55)}
    refused(
        "holds none of wan, .*its names are layers.000.weight, .* and 45 more; name another",
        save(tmp_path, names),
    )
    tensors = good(I2V)
    for i in range(2):
        for key in [key for key in tensors if key.startswith(f"blocks.{i}.cross_attn")]:
            tensors[key.replace("cross_attn", "cross")] = tensors.pop(key)
    refused(r"missing \(blocks.* and \d+ more\) and \d+ unexpected", save(tmp_path, tensors))


# Names and contents of files.


def test_the_content_tells_what_a_file_is_and_not_its_name(tmp_path):
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    pickled = save_torch(tmp_path / "a.safetensors", {"generator": good()})
    same_bits(come_in([pickled], tmp_path)[1], PARAMS[T2V])
    for suffix in ("pt", "bin", "ckpt"):
        save_file(good(), tmp_path / f"b.{suffix}")
        same_bits(come_in([tmp_path / f"b.{suffix}"], tmp_path)[1], PARAMS[T2V])


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is empty; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"GGUF\3\0\0\0", "is a GGUF file, quantised"),
        (b"nothing at all that one knows", "cannot read"),
        (b"PK\3\4 cut off", "cannot read"),
        (b"\x08\0\0\0\0\0\0\0{cut", "cannot read"),
    ],
)
def test_what_is_no_file_of_weights_is_told_in_a_sentence(tmp_path, suffix, data, told):
    file = tmp_path / f"x.{suffix}"
    file.write_bytes(data)
    refused(told, file)


def test_folders_of_bin_and_ckpt(tmp_path):
    tree = randomised(shapes_of(vae.PRESETS["tiny"], vae.init_vae), 1)
    tensors = from_table("vae", "official", tree)
    (tmp_path / "optimizer.bin").write_bytes(b"not even looked at")
    (tmp_path / "quantised.gguf").write_bytes(b"GGUF")
    for k in range(3):
        shard = {key: w for i, (key, w) in enumerate(sorted(tensors.items())) if i % 3 == k}
        save_torch(tmp_path / f"pytorch_model-{k + 1:05d}-of-00003.bin", shard)
    save_torch(tmp_path / "dit.ckpt", {"state_dict": good()})
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    unused = []
    found = find_networks(tmp_path, unused.append)
    assert (
        set(found) == {"vae", "wan"}
        and len(found["vae"].files) == 3
        and found["wan"].student == "state_dict"
    )
    assert {path.name for path in unused} == {"optimizer.bin", "quantised.gguf"}
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    refused(r"has 2 files pytorch_model-of-00003\.bin; download the rest", tmp_path)


# Other models.


def channels(tensors, made, taken):
    dim = len(tensors["patch_embedding.bias"])
    return tensors | {
        "patch_embedding.weight": ones(dim, taken, 1, 2, 2),
        "head.head.weight": ones(made * 4, dim),
        "head.head.bias": ones(made * 4),
    }


OTHERS = {
    "Wan 2.2 I2V A14B": (lambda: channels(good(), 16, 36),
                         "makes 16 channels of 36, without .* as Wan 2.2 I2V A14B"),
    "Wan 2.2 TI2V 5B": (lambda: channels(good(), 48, 48),
                        "makes 48 channels of 48, .* as Wan 2.2 TI2V 5B"),
    "Fun Control": (lambda: channels(good(I2V), 16, 48),
                    "makes 16 channels of 48, with .* as Wan 2.1 Fun Control"),
    "of 52": (lambda: channels(good(), 16, 52),
              "makes 16 channels of 52, without an image embedding; Wan 2.1 makes"),
    "T2V with an image": (lambda: channels(good(I2V), 16, 16),
                          "makes 16 channels of 16, with an image embedding;"),
    "colours": (lambda: channels(good(), 3, 19), "makes 3 channels of 19"),
    "VACE": (lambda: good() | {"vace_blocks.0.after_proj.weight": ones(2)},
             "of VACE: it has vace_blocks"),
    "Fun": (lambda: good(I2V) | {"ref_conv.weight": ones(2), "ref_conv.bias": ones(2)},
            r"of Wan-Fun: it has ref_conv\.bias and 1 more"),
    "Fun camera": (lambda: good(I2V) | {"control_adapter.conv.weight": ones(2)}, "of Wan-Fun"),
    "FLF2V": (lambda: good(I2V) | {"img_emb.emb_pos": ones(1, 514, 40)}, "of Wan 2.1 FLF2V"),
    "FastWan": (lambda: good() | {"blocks.0.to_gate_compress.weight": ones(2)},
                r"\(VSA gate weights\)"),
    "SkyReels-V2": (lambda: good() | {"fps_embedding.weight": ones(2)}, "of SkyReels-V2"),
    "S2V": (lambda: good() | {"casual_audio_encoder.encoder.weight": ones(2)}, "of Wan 2.2 S2V"),
    "Animate": (lambda: good(I2V) | {"face_adapter.fuser_blocks.0.weight": ones(2)},
                "of Wan 2.2 Animate"),
    "MultiTalk": (lambda: good(I2V) | {"blocks.0.audio_cross_attn.q.weight": ones(2)},
                  "of MultiTalk"),
    "anything": (lambda: good() | {"new_part.weight": ones(2)}, "1 unexpected .new_part.weight."),
    "its VAE": (lambda: {f"encoder.downsamples.{i}.downsamples.0.residual.2.weight": ones(2)
                         for i in range(4)},
                "of the VAE of Wan 2.2 TI2V 5B"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_is_refused_at_conversion(tmp_path, kind):
    make, told = OTHERS[kind]
    refused(told, save(tmp_path, make()))


def test_another_model_is_refused_behind_a_prefix_too(tmp_path):
    make, told = OTHERS["VACE"]
    refused(told, save(tmp_path, under("model.diffusion_model.", make())))


@pytest.mark.parametrize(
    ("folder", "file", "told", "index"),
    [
        ("high_noise_model", "x.safetensors", {}, None),
        ("x", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", {}, None),
        ("x", "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors", {}, None),
        ("Wan2.2-T2V-A14B-Diffusers/transformer", "x.safetensors", {}, None),
        ("a/transformer", "x.safetensors", {}, {"boundary_ratio": 0.875}),
        (
            "a/transformer",
            "x.safetensors",
            {},
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
        ),
        ("x", "x.safetensors", {"_class_name": "WanVACETransformer3DModel"}, None),
        ("x", "x.safetensors", {"model_type": "ti2v"}, None),
        ("x", "x.safetensors", {"model_type": ["t2v"]}, None),
        ("a/transformer", "x.safetensors", {}, {"transformer_2": True}),
    ],
)
def test_what_stands_beside_a_file_tells_another_model(tmp_path, folder, file, told, index):
    if index:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder).with_name("model_index.json").write_text(json.dumps(index))
    path = save(tmp_path / folder, good(), file, told=json.dumps({"num_heads": 2} | told))
    refused("of Wan 2.2|not Wan 2.1", path)
    refused("of Wan 2.2|not Wan 2.1", tmp_path)


def test_what_stands_beside_wan_2_1_does_no_harm(tmp_path):
    index = {
        "boundary_ratio": None,
        "transformer_2": [None, None],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    (tmp_path / "Wan2.1-T2V-14B").mkdir()
    (tmp_path / "Wan2.1-T2V-14B" / "model_index.json").write_text(json.dumps(index))
    for kind in ("WanTransformer3DModel", "WanModel", "CausalWanModel"):
        told = json.dumps({"num_heads": 2, "_class_name": kind, "model_type": "t2v"})
        file = save(
            tmp_path / "Wan2.1-T2V-14B" / "transformer",
            good(),
            "Wan2_1-T2V-14B_fp32.safetensors",
            told=told,
        )
        assert find_network([file]).config == T2V


def test_a_message_stays_short_at_40_layers(tmp_path):
    """Every name of a network of 14B's depth is known or not: ten of them are told."""
    config = PRESETS["wan2.1-t2v-tiny"].__class__(**{**vars(T2V), "num_layers": 40})
    tensors = {
        key: ones(*out.shape)
        for key, out in writing.writers(
            Transformer(config, shapes_of(config)), "official", None
        ).items()
    }
    extra = {f"blocks.{i}.x{j}.weight": ones(1) for i in range(40) for j in range(20)}
    refused(r"800 unexpected .* and 790 more", save(tmp_path, tensors | extra))
    wrong = {key: (ones(7) if re.search(r"norm3", key) else w) for key, w in tensors.items()}
    refused("which does not give .* and 70 more", save(tmp_path, wrong))


# What is kept of where a file comes from.


def test_the_record_of_our_export_goes_along(tmp_path):
    record = json.dumps({"config": {"chunk": 3}, "step": 7})
    file = save(tmp_path, good(), metadata={"format": "pt", "salt_jax": record})
    assert find_network([file]).record == record
    for layout in ("official", "diffusers"):
        write_official(
            Transformer(T2V, PARAMS[T2V]), tmp_path / layout, layout, max_shard=10**5, record=record
        )
        shards = sorted((tmp_path / layout).rglob("*.safetensors"))
        assert len(shards) > 1
        assert {read_metadata(shard)["salt_jax"] for shard in shards} == {record}
        assert find_network(shards).record == record
    assert find_network([save(tmp_path, good())]).record == ""
