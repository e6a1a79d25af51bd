"""Files of others come in and go out unchanged: names against tables by hand and against their own
libraries.
"""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from salt_jax.convert import names, reading, writing
from salt_jax.convert.folder import find_networks, weight_files
from salt_jax.convert.reading import find_network
from salt_jax.convert.sizes import Size, infer_config
from salt_jax.convert.writing import Transformer, open_wan, write_official
from salt_jax.errors import UserError
from salt_jax.io.tensor_files import write_tensors
from salt_jax.models import image_encoder, text_encoder, vae
from salt_jax.models.presets import PRESETS, Compute
from salt_jax.models.wan import Inputs, apply_wan
from salt_jax.types import Conditioning
from tests.convert.networks import I2V, T2V, come_in, from_table, official, save_torch, slow
from tests.helpers import (
    randomised,
    same_bits,
    shapes_of,
    to_diffusers,
    wan_inputs,
    wan_of_diffusers,
)
from tests.models.oracles import (
    CLIP,
    UMT5,
    clip_from_transformers,
    clip_of_transformers,
    from_diffusers,
    make_oracle,
    random_tokens,
    umt5_of_transformers,
)


@pytest.fixture
def release(tmp_path):
    """A transformer of the release in two shards: (files, params, config) for a config."""

    def make(config, dtype=np.float32, seed=1):
        params = jax.tree.map(lambda p: np.asarray(p, dtype), randomised(shapes_of(config), seed))
        tensors = official(params, config)
        folder = tmp_path / "release"
        folder.mkdir()
        halves = sorted(tensors)[::2], sorted(tensors)[1::2]
        for k, half in enumerate(halves, 1):
            file = folder / f"diffusion_pytorch_model-{k:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in half}, file)
        told = {
            "_class_name": "WanModel",
            "num_heads": config.num_heads,
            "text_len": 512,
            "eps": 1e-6,
        }
        (folder / "config.json").write_text(json.dumps(told))
        return sorted(folder.glob("*.safetensors")), params

    return make


@pytest.mark.parametrize(("config", "dtype"), [(T2V, np.float32), slow(I2V, ml_dtypes.bfloat16)])
def test_a_release_comes_in_and_goes_out_bit_for_bit(release, tmp_path, config, dtype):
    files, params = release(config, dtype)
    found, tree = come_in(files, tmp_path)
    assert (found.network, found.layout, found.student, found.config) == (
        "wan",
        "official",
        "",
        config,
    )
    same_bits(tree, params)
    for layout, folder in (("official", "a"), ("diffusers", "b/transformer")):
        write_official(Transformer(config, tree), tmp_path / folder[0], layout)
        (file,) = weight_files(tmp_path / folder[0])
        assert file == [tmp_path / folder / "diffusion_pytorch_model.safetensors"]
        again, back = come_in(file, tmp_path)
        assert (again.layout, again.config) == (layout, config)
        same_bits(back, params)
    same_bits(
        load_file(tmp_path / "a" / "diffusion_pytorch_model.safetensors"), official(params, config)
    )


def test_our_file_goes_out_as_arrays_on_devices_do(release, tmp_path):
    files, params = release(T2V)
    found = find_network(files)
    write_tensors(
        tmp_path / "wan.safetensors",
        reading.writers(found, None),
        {"config": json.dumps(found.config.__dict__)},
    )
    config, stored = open_wan(tmp_path)
    assert config == T2V
    write_official(Transformer(config, stored), tmp_path / "a", "official", max_shard=10**5)
    write_official(
        Transformer(config, jax.tree.map(jnp.asarray, params)), tmp_path / "b", "official"
    )
    (whole,), shards = (
        sorted((tmp_path / "b").glob("*.safetensors")),
        sorted((tmp_path / "a").glob("*.safetensors")),
    )
    index = json.loads(
        (tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    found = {name: (file.name, array) for file in shards for name, array in load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in found.values())
    sizes = [sum(a.nbytes for file, a in found.values() if file == shard.name) for shard in shards]
    assert (
        len(shards) > 2
        and max(sizes) <= 10**5
        and shards[0].name.endswith(f"-00001-of-{len(shards):05d}.safetensors")
    )
    same_bits({name: array for name, (_, array) in found.items()}, load_file(whole))
    with safe_open(whole, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(UserError, match="exists, and the new files could be taken for parts"):
        write_official(Transformer(config, stored), tmp_path / "a", "official")


fsdp = lambda name: re.sub(
    r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name
)
FAMILY = {
    "self forcing ema": lambda good, bad: {
        "generator": {f"model.{k}": v for k, v in bad.items()},
        "critic": {f"model.{k}": v for k, v in bad.items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{fsdp(k)}": v for k, v in good.items()},
        "step": np.int64([600]),
    },
    "self forcing ode": lambda good, bad: {"generator": {f"model.{k}": v for k, v in good.items()}},
    "causvid": lambda good, bad: {
        "model": {f"model._fsdp_wrapped_module.{fsdp(k)}": v for k, v in good.items()}
    },
    "bare": lambda good, bad: good,
    "comfy": lambda good, bad: {f"model.diffusion_model.{k}": v for k, v in good.items()},
    "compiled": lambda good, bad: {f"_orig_mod.module.{k}": v for k, v in good.items()},
}


@pytest.mark.parametrize("kind", ["self forcing ema", *(slow(kind) for kind in list(FAMILY)[1:])])
def test_the_student_of_a_training_is_found_whatever_wraps_its_names(tmp_path, kind):
    params = randomised(shapes_of(T2V), 1)
    bad = {k: np.zeros_like(v) for k, v in official(params, T2V).items()}
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    file = save_torch(tmp_path / "model.pt", FAMILY[kind](official(params, T2V), bad))
    found, tree = come_in([file], tmp_path)
    keys = {
        "self forcing ema": "generator_ema",
        "self forcing ode": "generator",
        "causvid": "model",
    }
    assert (found.student, found.config) == (keys.get(kind, ""), T2V)
    same_bits(tree, params)


def save_changed(tmp_path, change, config=T2V, heads=2):
    tensors = official(randomised(shapes_of(config), 1), config)
    change(tensors)
    if heads:
        (tmp_path / "config.json").write_text(json.dumps({"num_heads": heads}))
    save_file(tensors, tmp_path / "x.safetensors")
    return [tmp_path / "x.safetensors"]


def test_all_names_that_do_not_match_are_told_in_one_error(tmp_path):
    def change(tensors):
        del tensors["blocks.1.ffn.2.bias"], tensors["head.modulation"]
        tensors["blocks.0.ffn.3.weight"] = tensors["blocks.9x"] = np.zeros(3, np.float32)

    with pytest.raises(UserError) as error:
        find_network(save_changed(tmp_path, change))
    for told in (
        "wan with official names",
        "2 missing (blocks.1.ffn.2.bias, head.modulation)",
        "2 unexpected (blocks.0.ffn.3.weight, blocks.9x)",
        "x.safetensors",
    ):
        assert told in str(error.value)


def exchange(tensors, **new):
    tensors.update({k.replace("__", "."): np.zeros(v, np.float32) for k, v in new.items()})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: exchange(t, blocks__1__ffn__0__bias=(95,)),
         r"blocks\.1\.ffn\.0\.bias is \(95,\).*\(96,\)"),
        (lambda t: exchange(t, blocks__0__norm3__weight=(47,)), r"norm3\.weight is \(47,\)"),
        (lambda t: exchange(t, blocks__0__modulation=(2, 6, 48)), "shapes that no wan has"),
        (lambda t: exchange(t, patch_embedding__weight=(48, 64)), "shapes that no wan has"),
        (lambda t: exchange(t, head__head__weight=(48, 64)), r"head\.head\.weight is \(48, 64\)"),
        (lambda t: t.update({"head.modulation": np.zeros((1, 2, 48), np.int8)}),
         "head.modulation is int8"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("blocks.0")],
         r"missing \(blocks\.0\."),
    ],
)  # fmt: skip
def test_shapes_and_kinds_of_numbers_are_checked(tmp_path, change, told):
    with pytest.raises(UserError, match=told) as error:
        find_network(save_changed(tmp_path, change))
    assert "x.safetensors" in str(error.value)


def test_heads_come_from_the_config_or_from_a_published_size(tmp_path):
    with pytest.raises(
        UserError, match=r"number of heads; put a config\.json with num_heads beside it"
    ):
        find_network(save_changed(tmp_path, lambda t: None, heads=0))
    with pytest.raises(UserError, match="must split into num_heads=5"):
        find_network(save_changed(tmp_path, lambda t: None, heads=5))
    assert find_network(save_changed(tmp_path, lambda t: None, heads=4)).config.num_heads == 4


def test_what_is_no_network_of_wan_is_left_and_one_model_at_a_time_is_read(release, tmp_path):
    files, _ = release(T2V)
    folder = files[0].parent
    save_file({"conv.weight": np.zeros((3, 3), np.float32)}, folder / "other.safetensors")
    hidden = folder / ".cache" / "x.safetensors"
    hidden.parent.mkdir()
    hidden.write_text("no weights")
    unused = []
    assert find_networks(folder, unused.append).keys() == {"wan"}
    assert unused == [folder / "other.safetensors"]
    assert weight_files(files[1]) == [files]  # one shard stands for all
    with pytest.raises(UserError, match=r"holds none of wan, vae.*its names are conv\.weight"):
        find_networks(folder / "other.safetensors", unused.append)
    save_torch(folder / "student.pt", official(randomised(shapes_of(T2V), 2), T2V))
    with pytest.raises(UserError, match=r"00001-of-00002.* and .*student\.pt are both a wan"):
        find_networks(folder, unused.append)
    files[0].unlink()
    with pytest.raises(UserError, match=r"has 1 files .*-of-00002\.safetensors; download the rest"):
        find_networks(folder, unused.append)
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        find_networks(tmp_path / "nowhere", unused.append)


def test_layers_stored_differently_are_stored_as_float32(tmp_path):
    def half(tensors):
        for name in tensors:
            if name.startswith("blocks.0") or name.startswith("head"):
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    _, tree = come_in(save_changed(tmp_path, half), tmp_path)
    kinds = [str(tree[part]["modulation"].dtype) for part in ("head", "blocks")]
    assert kinds == ["bfloat16", "float32"]
    params = randomised(shapes_of(T2V), 1)
    np.testing.assert_array_equal(
        tree["blocks"]["modulation"][1], params["blocks"]["modulation"][1]
    )
    _, tree = come_in(save_changed(tmp_path, half), tmp_path, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    want = params["blocks"]["ffn_in"]["kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tree["blocks"]["ffn_in"]["kernel"], want)


@pytest.mark.parametrize(
    ("preset", "count", "numbers"),
    [
        slow("wan2.1-t2v-1.3b", 825, 1_418_996_800),
        slow("wan2.1-t2v-14b", 1095, 14_288_491_584),
        ("wan2.1-i2v-14b", 1303, 16_394_878_784),
    ],
)
def test_published_sizes_have_the_published_arrays(preset, count, numbers):
    """Counts of the released files, and some of their names and shapes."""
    config = PRESETS[preset]
    for layout in ("official", "diffusers"):
        arrays = writing.writers(Transformer(config, shapes_of(config)), layout, jnp.bfloat16)
        assert (
            len(arrays) == count and sum(array.nbytes for array in arrays.values()) == 2 * numbers
        )
    arrays = writing.writers(Transformer(config, shapes_of(config)), "official", None)
    last, dim, ffn = config.num_layers - 1, config.dim, config.ffn_dim
    known = {
        "patch_embedding.weight": (dim, config.in_channels, 1, 2, 2), "head.head.weight": (64, dim),
        "head.modulation": (1, 2, dim), f"blocks.{last}.modulation": (1, 6, dim),
        f"blocks.{last}.ffn.0.weight": (ffn, dim), f"blocks.{last}.ffn.2.weight": (dim, ffn),
        f"blocks.{last}.norm3.weight": (dim,), f"blocks.{last}.cross_attn.norm_k.weight": (dim,),
        "text_embedding.0.weight": (dim, 4096), "time_projection.1.weight": (6 * dim, dim),
    }  # fmt: skip
    if config.image_dim:
        known |= {
            "img_emb.proj.1.weight": (1280, 1280),
            f"blocks.{last}.cross_attn.k_img.weight": (dim, dim),
        }
    assert {name: arrays[name].shape for name in known} == known


def test_other_networks_have_the_published_number_of_arrays():
    per_layer = lambda table: sum("{i}" in row.diffusers for row in table)
    count = lambda table, layers: len(table) + (layers - 1) * per_layer(table)
    assert count(names.VAE, 1) == 194
    assert count(names.TEXT_ENCODER, 24) == 242
    assert per_layer(names.IMAGE_ENCODER) == 16 and count(names.IMAGE_ENCODER, 32) == 5 + 32 * 16


@pytest.mark.parametrize("layout", ["official", slow("diffusers")])
def test_encoders_and_vae_come_in_from_both_layouts(tmp_path, layout):
    """And what the CLIP files hold beside what Wan reads is left out."""
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    inits = {
        "vae": (vae.init_vae, vae.PRESETS["tiny"]),
        "text_encoder": (text_encoder.init_text_encoder, text_encoder.PRESETS["wan-tiny"]),
        "image_encoder": (image_encoder.init_image_encoder, image_encoder.PRESETS["tiny"]),
    }
    for network, (init, config) in inits.items():
        tree = randomised(shapes_of(config, init), 1)
        tensors = from_table(network, layout, tree)
        if network == "image_encoder":  # one layer more, of which nothing may be read
            extra = {
                n.replace(".1.", ".2.", 1): v + 9
                for n, v in tensors.items()
                if re.search(r"r(s)?\.1\.", n)
            }
            extra |= {"textual.x": np.ones(2, np.int64), "log_scale": np.ones((), np.float32)}
            extra |= {
                "visual.post_norm.weight"
                if layout == "official"
                else "post_layernorm.weight": np.ones(40)
            }
            tensors |= extra
        file = save_torch(
            tmp_path / "x.pth",
            {k: np.float32(v) if v.dtype == float else v for k, v in tensors.items()},
        )
        found, got = come_in([file], tmp_path)
        assert (found.network, found.layout, found.config) == (network, layout, config)
        same_bits(got, tree)


@pytest.mark.parametrize("preset", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b"])
def test_sizes_of_published_models_follow_from_their_shapes(preset):
    """Without a config.json: what comes in is what configs/ ask for."""
    config = PRESETS[preset]
    whole = flatten_dict(shapes_of(config), sep="/")
    layers = lambda ours: config.num_layers if ours.startswith("blocks/") else 1
    ours = {
        path: leaf.shape[1:] if path.startswith("blocks/") else leaf.shape
        for path, leaf in whole.items()
    }
    theirs = ours | {"patch_embedding/kernel": (config.dim, config.in_channels, 1, 2, 2)}
    sizes = {path: Size(layers(path), theirs[path], ours[path]) for path in ours}
    assert infer_config("wan", sizes, {}, "a test") == config


@pytest.mark.parametrize(
    ("network", "init", "config"),
    [
        ("vae", vae.init_vae, vae.PRESETS["wan2.1"]),
        ("text_encoder", text_encoder.init_text_encoder, text_encoder.PRESETS["umt5-xxl"]),
        ("image_encoder", image_encoder.init_image_encoder, image_encoder.PRESETS["vit-h-14"]),
    ],
)
def test_sizes_of_the_other_networks_follow_from_their_shapes(network, init, config):
    """Even beside the config.json of the release's transformer, whose heads are others."""
    whole = flatten_dict(shapes_of(config, init), sep="/")
    inner = {path: leaf.shape[path.startswith("blocks/") :] for path, leaf in whole.items()}
    layers = getattr(config, "num_layers", 1)
    sizes = {path: Size(layers, shape, shape) for path, shape in inner.items()}
    assert (
        infer_config(network, sizes, {"num_heads": 40, "num_attention_heads": 40}, "a test")
        == config
    )


# Against the libraries that define the layouts.


@pytest.fixture
def module():
    """A network of diffusers with every weight random, and the same weights as our tree."""

    def make(config):
        theirs, params = wan_of_diffusers(config), randomised(shapes_of(config), 5)
        theirs.load_state_dict(to_diffusers(params, config), strict=True)
        return theirs, params

    return make


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("config", [T2V, I2V])
def test_what_diffusers_saves_computes_the_same_here(tmp_path, module, config):
    torch = pytest.importorskip("torch")
    theirs, params = module(config)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    files = weight_files(tmp_path / "transformer")
    assert len(files) == 1 and len(files[0]) > 1
    found, tree = come_in(files[0], tmp_path)
    assert (found.layout, found.config) == ("diffusers", config)
    same_bits(tree, params)
    x, timestep, text = wan_inputs(2, config, rows=512)
    image = (
        np.random.default_rng(3).standard_normal((2, 5, config.image_dim or 1)).astype(np.float32)
    )
    with torch.no_grad():
        told = (torch.tensor(image),) if config.image_dim else ()
        want = theirs(
            torch.tensor(x.transpose(0, 4, 1, 2, 3)),
            torch.tensor(timestep),
            torch.tensor(text),
            *told,
        ).sample
    cond = Conditioning(jnp.asarray(text), jnp.asarray(image) if config.image_dim else None)
    seen = Inputs(jnp.asarray(x), jnp.asarray(timestep), cond)
    got = apply_wan(tree, seen, config, Compute())
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 3, 4, 1), atol=2e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("config", [T2V, I2V])
def test_diffusers_reads_what_we_write_in_both_layouts(tmp_path, module, config):
    """Its own converter knows the official names; its constructor reads our config.json."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from safetensors.torch import load_file as load_torch

    theirs, params = module(config)
    state, fresh = theirs.state_dict(), diffusers.WanTransformer3DModel
    for layout in ("official", "diffusers"):
        write_official(Transformer(config, params), tmp_path / layout, layout)
    tensors = load_torch(tmp_path / "official" / "diffusion_pytorch_model.safetensors")
    assert tensors.keys() == official(params, config).keys()
    folder = tmp_path / "diffusers" / "transformer"
    built = fresh.from_config(fresh.load_config(folder))
    public = lambda module: {
        k: v for k, v in json.loads(module.to_json_string()).items() if k[0] != "_"
    }
    assert public(built) == public(theirs)
    for found in (
        convert_wan_transformer_to_diffusers(tensors),
        load_torch(folder / "diffusion_pytorch_model.safetensors"),
    ):
        built.load_state_dict(found, strict=True)
        assert all(torch.equal(w, state[name]) for name, w in built.state_dict().items())


@pytest.mark.parity
def test_a_vae_of_diffusers_or_with_official_names_comes_in(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    theirs, params = make_oracle(vae.PRESETS["tiny"], base_dim=8, z_dim=16)
    theirs.save_pretrained(tmp_path / "vae")
    found, tree = come_in([tmp_path / "vae" / "diffusion_pytorch_model.safetensors"], tmp_path)
    assert (found.layout, found.config) == ("diffusers", vae.PRESETS["tiny"])
    same_bits(tree, params)
    named = from_table("vae", "official", params)
    converted = convert_wan_vae_to_diffusers({k: torch.tensor(v) for k, v in named.items()})
    theirs.load_state_dict(converted, strict=True)
    same_bits(from_diffusers(theirs.state_dict()), params)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("tied", ["both", "shared", "embed_tokens"])
def test_an_umt5_of_transformers_computes_the_same_here(tmp_path, tied):
    torch = pytest.importorskip("torch")
    theirs = umt5_of_transformers().requires_grad_(False)
    for name, w in theirs.named_parameters():
        w.copy_(
            ("norm" in name)
            + 0.2 * torch.randn(w.shape, generator=torch.Generator().manual_seed(len(name)))
        )
    state = {
        name: w.numpy()
        for name, w in theirs.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    if tied != "shared":
        table = state.pop("shared.weight")
        state |= {"encoder.embed_tokens.weight": table} if tied == "embed_tokens" else {}
        # as some releases leave it: the shared one is the one that counts
        state |= (
            {"shared.weight": table, "encoder.embed_tokens.weight": 0 * table}
            if tied == "both"
            else {}
        )
    save_file(state, tmp_path / "model.safetensors")
    found, tree = come_in([tmp_path / "model.safetensors"], tmp_path)
    assert (found.network, found.config) == ("text_encoder", UMT5)
    tokens = random_tokens([40, 7], 40)
    with torch.no_grad():
        ids = torch.from_numpy(np.array(tokens)).long()
        want = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state.numpy()
    got = np.asarray(text_encoder.encode_text(tree, tokens, found.config))
    np.testing.assert_allclose(
        got[np.asarray(tokens) != 0], want[np.asarray(tokens) != 0], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_clip_of_transformers_comes_in_without_its_last_layer(tmp_path, prefix):
    pytest.importorskip("torch")
    theirs = clip_of_transformers()
    theirs.save_pretrained(tmp_path)
    state = {
        k.removeprefix("vision_model."): v
        for k, v in load_file(tmp_path / "model.safetensors").items()
    }
    save_file({prefix + name: w for name, w in state.items()}, tmp_path / "model.safetensors")
    found, tree = come_in([tmp_path / "model.safetensors"], tmp_path)
    assert (found.network, found.layout, found.config) == ("image_encoder", "diffusers", CLIP)
    same_bits(tree, clip_from_transformers(state, 3))

    # The release fuses q, k and v: rows of one matrix, in this order.
    out, ones = {}, {"visual.cls_embedding": 2, "visual.pos_embedding": 1}
    for i in range(4):
        for kind in ("weight", "bias"):
            thirds = [state[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"visual.transformer.{i}.attn.to_qkv.{kind}"] = np.concatenate(thirds)
    for name, w in state.items():
        for there, here in OFFICIAL_CLIP.items():
            name = re.sub(there, here, name)
        if not re.search("[qkv]_proj", name):
            out[name] = w.reshape((1,) * ones.get(name, 0) + w.shape)
    again, fused = come_in([save_torch(tmp_path / "clip.pth", out)], tmp_path)
    assert (again.layout, again.config) == ("official", CLIP)
    same_bits(fused, tree)


OFFICIAL_CLIP = {
    r"^embeddings\.class_embedding$": "visual.cls_embedding",
    r"^embeddings\.position_embedding\.weight$": "visual.pos_embedding",
    r"^embeddings\.": "visual.",
    r"^pre_layrnorm": "visual.pre_norm",
    r"^post_layernorm": "visual.post_norm",
    r"^encoder\.layers\.(\d)\.": r"visual.transformer.\1.",
    r"layer_norm": "norm",
    r"self_attn\.out_proj": "attn.proj",
    r"mlp\.fc1": "mlp.0",
    r"mlp\.fc2": "mlp.2",
}
