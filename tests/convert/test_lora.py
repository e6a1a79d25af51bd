"""LoRAs of others: the merged weight is W + scale up @ down in every spelling, and what sets the
scale is applied.

Expected values are written in numpy from the formula; at the end the same files go through PEFT and
diffusers.
"""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from salt_jax.convert import reading
from salt_jax.convert.lora import find_lora, lora_alpha, lora_writers, merge_lora
from salt_jax.convert.reading import find_network
from salt_jax.convert.writing_lora import LowRank, open_lora, write_lora
from salt_jax.errors import UserError
from salt_jax.io.tensor_files import write_tensors
from salt_jax.models.lora import init_lora, merge
from tests.convert.networks import I2V, T2V, lora_file, official, save_torch
from tests.helpers import randomised, shapes_of, to_diffusers, wan_of_diffusers


class Network:
    """A small network in a file, its arrays by official name, and what a LoRA makes of them."""

    def __init__(self, folder, config):
        self.config, self.params = config, randomised(shapes_of(config), 1)
        self.arrays = official(self.params, config)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"num_heads": 2}')
        save_file(self.arrays, folder / "wan.safetensors")
        self.found = find_network([folder / "wan.safetensors"])

    def merged(self, *loras, strengths=(1.0,)):
        """Official name -> array, as launch.convert_wan would write it."""
        found = self.found
        for lora, strength in zip(loras, strengths, strict=True):
            found = merge_lora(found, lora, strength)
        arrays = {}
        for name, out in reading.writers(found, None).items():
            parts = [np.asarray(part) for part in out.parts()]
            arrays[name] = (
                np.concatenate([p[None] for p in parts]) if name.startswith("blocks/") else parts[0]
            )
        return official(unflatten_dict(arrays, sep="/"), self.config)

    def find(self, path, tensors, metadata=None):
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
        return find_lora(path, self.found)

    def check(self, got, deltas):
        """`deltas`: what is added, by official name; all else is as it was."""
        assert got.keys() == self.arrays.keys() and deltas.keys() <= got.keys()
        for name, array in self.arrays.items():
            want = array.astype(np.float64) + deltas.get(name, 0)
            np.testing.assert_allclose(got[name], want, atol=2e-5, err_msg=name)
            assert name in deltas or got[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return Network(tmp_path_factory.mktemp("t2v"), T2V)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return Network(tmp_path_factory.mktemp("i2v"), I2V)


# Official module -> Diffusers'.
MODULES = {
    f"blocks.{i}.{a}": f"blocks.{i}.{b}"
    for i in (0, 1)
    for a, b in {
        "self_attn.q": "attn1.to_q", "self_attn.o": "attn1.to_out.0", "cross_attn.k": "attn2.to_k",
        "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    }.items()
}  # fmt: skip


@functools.cache
def factors(rank=4, out=48, into=48, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        rng.standard_normal(shape).astype(np.float32) for shape in ((rank, into), (out, rank))
    )


def factors_of(network, module, rank=4):
    """down, up"""
    out, into = network.arrays[f"{module}.weight"].shape[:2]
    return factors(rank, out, into, sum(map(ord, module)))


def product(network, module, scale=1.0, rank=4):
    down, up = factors_of(network, module, rank)
    return {f"{module}.weight": scale * up.astype(np.float64) @ down}


def peft(network, modules=MODULES, front="", rank=4, name=lambda a, b: a):
    out = {}
    for a, b in modules.items():
        down, up = factors_of(network, a, rank)
        out |= {
            f"{front}{name(a, b)}.lora_A.weight": down,
            f"{front}{name(a, b)}.lora_B.weight": up,
        }
    return out


def everywhere(network, scale):
    return functools.reduce(dict.__or__, (product(network, module, scale) for module in MODULES))


diffusers_name = lambda a, b: b
header = lambda **told: {
    "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in told.items()})
}


@pytest.mark.parametrize(
    ("told", "scale"),
    [
        (dict(r=4, lora_alpha=16), 4),
        (dict(r=4, lora_alpha=4), 1),
        (dict(r=4, lora_alpha=4, use_rslora=True), 2),
        (dict(r=4, lora_alpha=6.0, use_rslora=False, lora_dropout=0.1, target_modules=["to_q"],
              bias="none"),
         1.5),
        (dict(r=4, lora_alpha=-2), -0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "where", ["diffusers", "pipeline", "json", "json of peft", "flat", "other key"]
)
def test_alpha_and_rslora_are_applied_wherever_they_stand(t2v, tmp_path, told, scale, where):
    tensors, metadata = peft(t2v, front="transformer.", name=diffusers_name), None
    if where == "diffusers":
        metadata = header(**told) | {"format": "pt"}
    elif where == "pipeline":  # of a model's own save_lora_adapter: no component in front
        metadata = {"lora_adapter_metadata": json.dumps(told)}
    elif where.startswith("json"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(told | {"peft_type": "LORA"}))
        front = "base_model.model." if where == "json of peft" else ""
        tensors = peft(t2v, front=front, name=diffusers_name)
    elif where == "flat":
        metadata = {k: json.dumps(v) for k, v in told.items() if k in ("lora_alpha", "use_rslora")}
    else:
        metadata = {"training": json.dumps(told | {"learning_rate": 1e-4})}
    lora = t2v.find(tmp_path / "lora.safetensors", tensors, metadata)
    t2v.check(t2v.merged(lora), everywhere(t2v, scale))


def test_nothing_said_is_a_scale_of_one(t2v, tmp_path):
    lora = t2v.find(tmp_path / "lora.safetensors", peft(t2v), {"format": "pt", "note": "{not JSON"})
    assert (lora.ranks, lora.alphas) == ([4], [4.0])
    t2v.check(t2v.merged(lora), everywhere(t2v, 1))


@pytest.mark.parametrize(
    ("alphas", "scale_of"),
    [
        ({"to_q": 16}, lambda a, b: 4 if b.endswith("to_q") else 2),
        ({"blocks.0.attn1.to_q": 16}, lambda a, b: 4 if b == "blocks.0.attn1.to_q" else 2),
        (
            {r"blocks\.1\..*": 4, "to_q": 16},
            lambda a, b: 1 if ".1." in a else 4 if b.endswith("to_q") else 2,
        ),
        ({"^blocks.0.attn1.to_q": 16}, lambda a, b: 4 if b == "blocks.0.attn1.to_q" else 2),
        ({"o_q": 16}, lambda a, b: 2),  # part of a name is not its end
    ],
)
def test_alpha_pattern_is_matched_as_peft_does(t2v, tmp_path, alphas, scale_of):
    metadata = header(r=4, lora_alpha=8, alpha_pattern=alphas)
    tensors = peft(t2v, front="transformer.", name=diffusers_name)
    lora = t2v.find(tmp_path / "lora.safetensors", tensors, metadata)
    deltas = [product(t2v, a, scale_of(a, b)) for a, b in MODULES.items()]
    t2v.check(t2v.merged(lora), functools.reduce(dict.__or__, deltas))


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_by_module_with_rank_pattern(t2v, tmp_path, rslora):
    wide = {a: b for a, b in MODULES.items() if ".1." in a}
    small = {a: b for a, b in MODULES.items() if ".0." in a}
    tensors = peft(t2v, wide, rank=9, name=diffusers_name) | peft(
        t2v, small, rank=4, name=diffusers_name
    )
    told = dict(r=4, lora_alpha=12, use_rslora=rslora, rank_pattern={r"blocks\.1\.\S+": 9})
    lora = t2v.find(tmp_path / "lora.safetensors", tensors, header(**told))
    assert lora.ranks == [4, 9]
    scale = lambda rank: 12 / rank**0.5 if rslora else 12 / rank
    deltas = [product(t2v, a, scale(9), 9) for a in wide] + [
        product(t2v, a, scale(4)) for a in small
    ]
    t2v.check(t2v.merged(lora), functools.reduce(dict.__or__, deltas))


KOHYA = lambda a, b: "lora_unet_" + a.replace(".", "_")
SPELLINGS = {
    "peft": (lambda a, b: f"base_model.model.{a}", "lora_A.weight", "lora_B.weight"),
    "peft, adapter named": (lambda a, b: f"base_model.model.{b}",
                            "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": (lambda a, b: f"transformer.{b}", "lora_A.weight", "lora_B.weight"),
    "diffusion-pipe": (lambda a, b: f"diffusion_model.{a}", "lora_A.weight", "lora_B.weight"),
    "comfyui": (lambda a, b: f"diffusion_model.{a}", "lora_down.weight", "lora_up.weight"),
    "lightx2v without prefix": (lambda a, b: a, "lora_down.weight", "lora_up.weight"),
    "kohya": (KOHYA, "lora_down.weight", "lora_up.weight"),
    "kohya of diffusers": (lambda a, b: "lora_transformer_" + b.replace(".", "_"),
                           "lora_down.weight", "lora_up.weight"),
    "lycoris": (lambda a, b: "lycoris_" + a.replace(".", "_"),
                "lora_down.weight", "lora_up.weight"),
    "older diffusers": (lambda a, b: f"transformer.{b}", "lora.down.weight", "lora.up.weight"),
    "without .weight": (lambda a, b: f"model.{a}", "lora_A", "lora_B"),
    "fsdp": (
        lambda a, b: "_fsdp_wrapped_module." + a.replace(".", "._checkpoint_wrapped_module.", 1),
        "lora_A.weight", "lora_B.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in SPELLINGS for dtype in (np.float32, None)]
    + [("kohya", dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float64, np.int64)],
)
def test_every_spelling_is_merged_with_the_alpha_of_each_module(t2v, tmp_path, kind, dtype):
    name, down_name, up_name = SPELLINGS[kind]
    tensors, deltas = {}, {}
    for k, (a, b) in enumerate(MODULES.items()):
        rank = 4 + k % 2
        down, up = factors_of(t2v, a, rank)
        tensors |= {f"{name(a, b)}.{down_name}": down, f"{name(a, b)}.{up_name}": up}
        if dtype is not None:
            tensors[f"{name(a, b)}.alpha"] = np.array(2 + k, dtype)
        deltas |= product(t2v, a, 1 if dtype is None else (2 + k) / rank, rank)
    metadata = {"ss_network_alpha": "1", "ss_network_dim": "4"} if dtype else None
    lora = t2v.find(tmp_path / "lora.safetensors", tensors, metadata)
    t2v.check(t2v.merged(lora), deltas)


def test_kohyas_header_does_not_count_twice(t2v, tmp_path):
    """musubi-tuner's converter multiplies alpha into the matrices, and copies the header."""
    kohya = {"ss_network_alpha": "2.0", "ss_network_dim": "4"}
    lora = t2v.find(tmp_path / "lora.safetensors", peft(t2v, front="diffusion_model."), kohya)
    t2v.check(t2v.merged(lora), everywhere(t2v, 1))
    named = lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    tensors = {named(key): w for key, w in peft(t2v, name=KOHYA).items()}
    with pytest.raises(UserError, match=r"ss_network_alpha 2 .* of rank 4 has no alpha"):
        t2v.find(tmp_path / "lora.safetensors", tensors, kohya)
    same = {"ss_network_alpha": "4.0", "ss_network_dim": "4"}
    t2v.check(
        t2v.merged(t2v.find(tmp_path / "lora.safetensors", tensors, same)), everywhere(t2v, 1)
    )


def test_longlives_file_of_torch_and_a_helper_beside_it(t2v, tmp_path):
    _, matrices = lora_file(tmp_path / "lora.pt", t2v.params, 4)
    other = {k: 9 * v for k, v in matrices.items()}
    path = save_torch(
        tmp_path / "lora.pt",
        {"critic_lora": other, "generator_lora": matrices, "step": np.int64([1])},
    )
    front, deltas = "base_model.model.", {}
    for name in t2v.arrays:
        layer = front + name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in matrices and name.endswith(".weight"):
            deltas[name] = (
                matrices[f"{layer}.lora_B.weight"].astype(float)
                @ matrices[f"{layer}.lora_A.weight"]
            )
    lora = find_lora(path, t2v.found)
    assert lora.key == "generator_lora" and len(lora.adapters) == len(deltas) == 20
    t2v.check(t2v.merged(lora), deltas)


WHOLE = {  # suffix and name of the array that it is added to
    "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    "blocks.1.norm3.diff": "blocks.1.norm3.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
    "blocks.0.cross_attn.norm_k.w_norm": "blocks.0.cross_attn.norm_k.weight",
    "blocks.0.ffn.0.diff": "blocks.0.ffn.0.weight",
    "blocks.1.diff_m": "blocks.1.modulation",
    "blocks.0.modulation.diff": "blocks.0.modulation",
    "head.diff_m": "head.modulation",
    "head.head.diff": "head.head.weight",
    "head.head.diff_b": "head.head.bias",
    "time_embedding.0.diff_b": "time_embedding.0.bias",
    "time_projection.1.diff": "time_projection.1.weight",
    "text_embedding.2.diff": "text_embedding.2.weight",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
}


@pytest.mark.parametrize("front", ["", "diffusion_model."])
def test_differences_of_any_array_are_added_as_lightx2v_writes_them(t2v, tmp_path, front):
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(t2v.arrays[whole].shape).astype(np.float32)
        for name, whole in WHOLE.items()
    }
    deltas = {whole: 0.5 * tensors[name].astype(float) for name, whole in WHOLE.items()}
    low = "blocks.1.cross_attn.v"
    down, up = factors_of(t2v, low)
    tensors |= {
        f"{low}.lora_down.weight": down,
        f"{low}.lora_up.weight": up,
        f"{low}.alpha": np.float32(2),
    }
    deltas |= product(t2v, low, 0.25)
    lora = t2v.find(tmp_path / "lora.safetensors", {front + k: v for k, v in tensors.items()})
    t2v.check(t2v.merged(lora, strengths=[0.5]), deltas)


OUTSIDE = (
    "head.head",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "text_embedding.0",
    "text_embedding.2",
)


def test_matrices_outside_of_the_blocks_and_the_convolution_are_adapted(t2v, tmp_path):
    tensors = {f"diffusion_model.{k}": v for k, v in peft(t2v, dict.fromkeys(OUTSIDE, "")).items()}
    deltas = functools.reduce(dict.__or__, (product(t2v, module) for module in OUTSIDE))
    rng = np.random.default_rng(1)
    shape = t2v.arrays["patch_embedding.weight"].shape
    down = rng.standard_normal((3, *shape[1:])).astype(np.float32)
    up = rng.standard_normal((shape[0], 3, 1, 1, 1)).astype(np.float32)
    front = "diffusion_model.patch_embedding"
    tensors |= {
        f"{front}.lora_down.weight": down,
        f"{front}.lora_up.weight": up,
        f"{front}.alpha": np.float32(6),
    }
    deltas["patch_embedding.weight"] = 2 * np.einsum(
        "or,rcthw->octhw", up[..., 0, 0, 0].astype(float), down
    )
    t2v.check(t2v.merged(t2v.find(tmp_path / "a.safetensors", tensors)), deltas)
    flat = {
        f"{front}.lora_down.weight": down.reshape(3, -1),
        f"{front}.lora_up.weight": up.reshape(-1, 3),
    }
    t2v.check(t2v.merged(t2v.find(tmp_path / "b.safetensors", tensors | flat)), deltas)


def test_a_bias_of_peft_is_scaled_as_the_matrix_is(t2v, tmp_path):
    """PEFT's lora_bias: the bias of B, times alpha / rank."""
    module = "blocks.0.ffn.0"
    bias = np.arange(96, dtype=np.float32)
    tensors = peft(t2v, {module: ""}) | {f"{module}.lora_B.bias": bias}
    lora = t2v.find(
        tmp_path / "lora.safetensors", tensors, header(r=4, lora_alpha=8, lora_bias=True)
    )
    t2v.check(t2v.merged(lora), product(t2v, module, 2) | {f"{module}.bias": 2.0 * bias})


def test_loras_add_up_each_with_its_strength(t2v, tmp_path):
    one = t2v.find(tmp_path / "a.safetensors", peft(t2v), header(r=4, lora_alpha=8))
    two = t2v.find(tmp_path / "b.safetensors", {"blocks.0.norm3.diff_b": np.ones(48, np.float32)})
    deltas = everywhere(t2v, -0.5 * 2) | {"blocks.0.norm3.bias": 3 * np.ones(48)}
    t2v.check(t2v.merged(one, two, strengths=[-0.5, 3.0]), deltas)


def test_an_image_lora_fits_image_models_only(t2v, i2v, tmp_path):
    modules = dict.fromkeys(
        ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1"), ""
    )
    tensors = peft(i2v, modules, front="diffusion_model.")
    tensors["diffusion_model.img_emb.proj.4.diff"] = np.ones(48, np.float32)
    lora = i2v.find(tmp_path / "lora.safetensors", tensors)
    deltas = functools.reduce(dict.__or__, (product(i2v, module) for module in modules))
    i2v.check(i2v.merged(lora), deltas | {"img_emb.proj.4.weight": np.ones(48)})
    with pytest.raises(
        UserError, match=r"adapts .*k_img.* of image-to-video models, and .* is text-to-video"
    ):
        find_lora(tmp_path / "lora.safetensors", t2v.found)


ones = lambda *shape: np.ones(shape, np.float32)
Q = "blocks.0.self_attn.q"


def changed(**new):
    """A good LoRA with arrays more, or without some. `__` stands for a dot."""

    def make(network):
        tensors = peft(network)
        for name, value in new.items():
            name = name.replace("__", ".").replace("Q.", f"{Q}.")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        return tensors

    return make


REFUSED = {
    "two alphas": (changed(), header(r=4, lora_alpha=16), {"lora_alpha": 8},
                   r"adapter_config\.json and .* contradict"),
    "alpha and tensor": (changed(Q__alpha=ones()), header(r=4, lora_alpha=16), None,
                         "contradict each other"),
    "another rank": (changed(), header(r=8, lora_alpha=8), None, "has rank 4 at .*says 8"),
    "alpha 0": (changed(Q__alpha=0 * ones()), None, None,
                "alpha of blocks.0.self_attn.q .* is '0.0', not a finite"),
    "alpha nan": (changed(Q__alpha=np.nan * ones()), None, None, "'nan'"),
    "alpha inf": (changed(), header(r=4, lora_alpha=float("inf")), None, "'inf'"),
    "alpha of two": (changed(Q__alpha=ones(2)), None, None, "'nan'"),
    "alpha text": (changed(), header(r=4, lora_alpha="much"), None, "'much'"),
    "alpha 0 in a pattern": (changed(), header(r=4, lora_alpha=4, alpha_pattern={"q": 0}), None,
                             "alpha_pattern"),
    "bad pattern": (changed(), header(r=4, lora_alpha=4, alpha_pattern={"(": 8}), None,
                    "no regular expression"),
    "rslora perhaps": (changed(), header(r=4, lora_alpha=4, use_rslora="maybe"), None,
                       "neither true nor false"),
    "two layouts": (lambda n: peft(n) | peft(n, {Q: "blocks.0.attn1.to_q"}, name=diffusers_name),
                    None, None, "has a weight too many"),
    "kohya nan": (changed(head__head__lora_down__weight=ones(4, 48)), {"ss_network_alpha": "nan"},
                  None, "ss_network"),
    "rslora alone": (changed(), header(use_rslora=True), None, "use_rslora and no lora_alpha"),
    "rank 0": (changed(Q__lora_A__weight=ones(0, 48), Q__lora_B__weight=ones(48, 0)), None, None,
               "rank 0"),
    "dora flag": (changed(), header(r=4, lora_alpha=4, use_dora=True), None,
                  "says use_dora 'True'"),
    "dora flag elsewhere": (changed(), {"x": '{"use_dora": true}'}, None, "says use_dora 'True'"),
    "dora": (changed(Q__dora_scale=ones(48, 1)), None, None, "q.dora_scale, of DoRA"),
    "dora of peft": (changed(Q__lora_magnitude_vector=ones(48)), None, None, "of DoRA"),
    "loha": (lambda n: {f"lora_unet_{Q.replace('.', '_')}.hada_w1_a": ones(4, 4)}, None, None,
             "of LoHa"),
    "lokr": (lambda n: {f"{Q}.lokr_w1": ones(4, 4)}, None, None, "of LoKr"),
    "tucker": (changed(Q__lora_mid__weight=ones(4, 4, 1, 1)), None, None, "three factors"),
    "reshape": (changed(Q__reshape_weight=ones(2)), None, None, "changes shapes"),
    "set": (changed(Q__set_weight=ones(48, 48)), None, None, "replace those"),
    "bias all": (changed(), header(r=4, lora_alpha=4, bias="all"), None, "says bias 'all'"),
    "fan_in_fan_out": (changed(), header(r=4, lora_alpha=4, fan_in_fan_out=True), None,
                       "says fan_in_fan_out"),
    "modules_to_save": (changed(), None, {"lora_alpha": 4, "modules_to_save": ["head"]},
                        "says modules_to_save"),
    "pissa": (changed(), None, {"lora_alpha": 4, "init_lora_weights": "pissa_niter_16"},
              "init_lora_weights"),
    "ia3": (changed(), None, {"lora_alpha": 4, "peft_type": "IA3"}, "says peft_type 'IA3'"),
    "unknown": (changed(), None, {"lora_alpha": 4, "scale_everything": 3},
                "says scale_everything '3'"),
    "no json": (changed(), {"lora_adapter_metadata": "{"}, None, "cannot read .* as JSON"),
    "half": (changed(Q__lora_A__weight=None), None, None, "q has up, no two factors"),
    "alpha alone": (lambda n: {f"{Q}.alpha": ones()}, None, None, "q has alpha, no two factors"),
    "no place": (changed(blocks__0__ffn__9__lora_A__weight=ones(4, 4)), None, None,
                 r"unexpected blocks\.0\.ffn\.9"),
    "another front": (changed(x__blocks__0__ffn__2__diff_b=ones(48)), None, None,
                      r"unexpected x\.blocks\.0"),
    "text encoder": (changed(lora_te_x__alpha=ones()), None, None, "unexpected lora_te_x.alpha"),
    "shape": (changed(Q__lora_B__weight=ones(5, 4)), None, None,
              r"\(48, 48\), its LoRA .*\(5, 4\)"),
    "rank of halves": (changed(Q__lora_A__weight=ones(3, 48)), None, None, "its LoRA"),
    "shape of a difference": (changed(Q__diff_b=ones(47)), None, None,
                              r"\(48,\), its difference \(47,\)"),
    "whole and low": (changed(Q__diff=ones(48, 48)), None, None, "q has down and up and weight"),
    "integers": (changed(Q__diff_b=np.ones(48, np.int8)), None, None, "an array is int8"),
    "no bias": (changed(blocks__0__self_attn__norm_q__diff_b=ones(48)), None, None,
                "a bias too many"),
    "two adapters": (changed(Q__lora_A__a__weight=ones(4, 48)), None, None, "two adapters"),
    "nothing": (lambda n: {}, None, None, "it is empty"),
    "no lora": (lambda n: n.arrays, None, None, "is no LoRA of this network: its names are blocks"),
    "deeper": (lambda n: {"blocks.39.ffn.0.lora_A.weight": ones(4, 5),
                          "blocks.39.ffn.0.lora_B.weight": ones(5, 4)},
               None, None, "adapts layer 39, and .* has 2, counted from 0"),
    "wan 2.2": (lambda n: peft(n, front="transformer_2."), None, None,
                "second transformer of Wan 2.2"),
    "both of wan 2.2": (lambda n: (peft(n, front="transformer.")
                                   | peft(n, {Q: Q}, front="transformer_2.")),
                        None, None, r"unexpected transformer_2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_applied_rightly_is_refused_in_a_sentence(t2v, tmp_path, kind):
    make, metadata, beside, told = REFUSED[kind]
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    with pytest.raises(UserError, match=told) as error:
        t2v.find(tmp_path / "lora.safetensors", make(t2v), metadata)
    assert str(tmp_path) in str(error.value) or kind == "bad pattern"
    assert len(str(error.value)) < 900 and "\n" not in str(error.value)


def test_no_message_lists_more_than_ten_names(t2v, tmp_path):
    names = [f"blocks.{i}.mlp.{part}.lora_down.weight" for i in range(40) for part in "abcdefghij"]
    with pytest.raises(UserError, match="and 390 more") as error:
        t2v.find(tmp_path / "lora.safetensors", dict.fromkeys(names, ones(4, 4)) | peft(t2v))
    assert len(str(error.value)) < 1000
    with pytest.raises(UserError, match="and 390 more"):
        t2v.find(tmp_path / "lora.safetensors", dict.fromkeys(names, ones(4, 4)))


def every_matrix(network, front="transformer."):
    names = [
        n.removesuffix(".weight")
        for n, w in network.arrays.items()
        if n.startswith("blocks.") and w.ndim == 2
    ]
    return peft(network, dict.fromkeys(names, ""), front=front), names


def test_a_kept_lora_has_the_scale_it_came_with(t2v, tmp_path):
    tensors, names = every_matrix(t2v)
    lora = t2v.find(
        tmp_path / "lora.safetensors", tensors, header(r=4, lora_alpha=4, use_rslora=True)
    )
    rank, alpha = lora_alpha(lora)
    assert (rank, alpha) == (4, 8)
    told = {"config": json.dumps({"rank": rank, "alpha": alpha})}
    write_tensors(tmp_path / "kept.safetensors", lora_writers(lora, 2, None), told)
    tree, rank, alpha = open_lora(tmp_path / "kept.safetensors")
    assert (rank, alpha) == (4, 8)
    tree = unflatten_dict(load_file(tmp_path / "kept.safetensors"), sep="/")
    whole = merge(
        t2v.params, jax.tree.map(jnp.asarray, tree), SimpleNamespace(rank=rank, alpha=alpha)
    )
    deltas = [product(t2v, name, 2) for name in names]
    got = official(jax.tree.map(np.asarray, whole), T2V)
    for name, delta in functools.reduce(dict.__or__, deltas).items():
        np.testing.assert_allclose(got[name], t2v.arrays[name] + delta, atol=2e-5)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (
            lambda n: peft(n) | {f"{Q}.diff_b": ones(48)},
            "changes 1 arrays as a whole, such as blocks/self_attn/q/bias",
        ),
        (lambda n: peft(n) | {f"{Q}.alpha": ones()}, "has ranks 4 and scales 0.25, 1"),
        (lambda n: peft(n) | peft(n, {Q: Q}, rank=5), "has ranks 4, 5"),
        (lambda n: peft(n, {"head.head": ""}), "adapts head/linear/kernel outside"),
        (lambda n: peft(n, {Q: Q}), "leaves out blocks/self_attn/q/kernel of layer 1"),
    ],
)
def test_a_lora_that_our_file_cannot_tell_is_not_kept(t2v, tmp_path, tensors, told):
    lora = t2v.find(tmp_path / "lora.safetensors", tensors(t2v))
    with pytest.raises(UserError, match=f"{told}.*leave out --keep_lora to merge it"):
        lora_alpha(lora)
        lora_writers(lora, 2, None)


def our_lora(rank=3):
    params = init_lora(jax.random.key(0), {"blocks": randomised(shapes_of(T2V), 1)["blocks"]}, rank)
    return randomised(params, 4)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_our_lora_goes_out_and_comes_back(t2v, tmp_path, layout):
    params = our_lora()
    file = write_lora(LowRank(params, 3, 6.0), tmp_path / "out", layout, record='{"step": 1}')
    tensors = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    flat = flatten_dict(params, sep="/")
    a, b = flat["blocks/ffn_in/kernel/lora_a"], flat["blocks/ffn_in/kernel/lora_b"]
    names = {
        "diffusers": ("transformer.blocks.1.ffn.net.0.proj", "lora_A", "lora_B"),
        "comfyui": ("diffusion_model.blocks.1.ffn.0", "lora_down", "lora_up"),
    }[layout]
    np.testing.assert_array_equal(tensors[f"{names[0]}.{names[1]}.weight"], a[1].T)
    np.testing.assert_array_equal(tensors[f"{names[0]}.{names[2]}.weight"], b[1].T)
    assert metadata["salt_jax"] == '{"step": 1}' and metadata["format"] == "pt"
    assert len(tensors) == 20 * (3 if layout == "comfyui" else 2)
    whole = official(merge(t2v.params, params, SimpleNamespace(rank=3, alpha=6.0)), T2V)
    got = t2v.merged(find_lora(file, t2v.found))
    for name, want in whole.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5)
    with pytest.raises(UserError, match="exists; name another folder"):
        write_lora(LowRank(params, 3, 6.0), tmp_path / "out", layout)


# Against PEFT and diffusers.


def same_as_theirs(got, module, config):
    """Our merged arrays under diffusers' names and those of its module."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    torch = pytest.importorskip("torch")
    state = module.state_dict()
    ours = convert_wan_transformer_to_diffusers({k: torch.tensor(v) for k, v in got.items()})
    assert ours.keys() == state.keys()
    for name, want in state.items():
        np.testing.assert_allclose(ours[name].numpy(), want.numpy(), atol=2e-5, err_msg=name)


@pytest.fixture
def theirs(t2v):
    pytest.importorskip("torch")
    module = wan_of_diffusers(T2V)
    module.load_state_dict(to_diffusers(t2v.params, T2V), strict=True)
    return module


def random_lora(module):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    for name, w in module.named_parameters():
        if "lora_" in name:
            w.data.copy_(0.3 * torch.randn(w.shape, generator=generator))


PEFT = {
    "alpha": dict(r=4, lora_alpha=16, target_modules=["to_q", "to_v", "ffn.net.2"]),
    "rslora": dict(r=4, lora_alpha=4, use_rslora=True, target_modules=["to_q", "proj_out"]),
    "patterns": dict(
        r=4, lora_alpha=4, target_modules=["to_q", "to_k"], rank_pattern={"to_q": 2},
        alpha_pattern={r"blocks\.1\.attn1\.to_q": 9, "^blocks.0.attn2.to_k": 3},
    ),
    "rslora and patterns": dict(
        r=4, lora_alpha=4, use_rslora=True, target_modules=["to_q"],
        alpha_pattern={"attn1.to_q": 9},
    ),
    "bias": dict(r=4, lora_alpha=8, lora_bias=True, target_modules=["to_q", "linear_1"]),
    "convolution": dict(r=4, lora_alpha=8,
                        target_modules=["patch_embedding", "time_proj", "to_out.0"]),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_saves_is_merged_as_peft_does(t2v, theirs, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(theirs, peft.LoraConfig(**PEFT[kind]))
    random_lora(model)
    model.save_pretrained(tmp_path)
    got = t2v.merged(find_lora(tmp_path / "adapter_model.safetensors", t2v.found))
    same_as_theirs(got, model.merge_and_unload(), T2V)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["alpha", "rslora", "patterns"])
def test_what_diffusers_saves_is_merged_as_diffusers_does(t2v, theirs, tmp_path, kind):
    """Its pipeline writes lora_adapter_metadata, and its loader reads it."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    config = peft.LoraConfig(**PEFT[kind])
    theirs.add_adapter(config)
    random_lora(theirs)
    diffusers.WanPipeline.save_lora_weights(
        tmp_path,
        peft.get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=config.to_dict()
        | {"target_modules": sorted(config.target_modules), "peft_type": "LORA"},
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    same_as_theirs(
        t2v.merged(find_lora(file, t2v.found)), fused(wan_of_diffusers(T2V), t2v, file), T2V
    )


def fused(module, network, file, **more):
    """The network of diffusers with a LoRA file fused into it by diffusers' own loader."""
    diffusers = pytest.importorskip("diffusers")
    module.load_state_dict(to_diffusers(network.params, network.config), strict=True)
    loader = diffusers.WanPipeline
    state, metadata = loader.lora_state_dict(str(file), return_lora_metadata=True)
    loader.load_lora_into_transformer(state, transformer=module, metadata=metadata, **more)
    module.fuse_lora()
    module.unload_lora()
    return module


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["comfyui", "diffusion-pipe", "kohya", "diffusers"])
def test_other_spellings_are_merged_as_diffusers_does(t2v, tmp_path, kind):
    pytest.importorskip("peft")
    name, down_name, up_name = SPELLINGS[kind]
    tensors = {}
    modules = {
        f"blocks.{i}.{part}.{x}": f"blocks.{i}.{there}.{y}"
        for i in (0, 1)
        for part, there in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x, y in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    } | MODULES
    for k, (a, b) in enumerate(modules.items()):
        down, up = factors_of(t2v, a)
        tensors |= {f"{name(a, b)}.{down_name}": down, f"{name(a, b)}.{up_name}": up}
        if kind != "diffusers":
            tensors[f"{name(a, b)}.alpha"] = np.array(1 + k, np.float32)
        if kind == "comfyui":
            tensors[f"{name(a, b)}.diff_b"] = np.full(len(up), 0.1 * k, np.float32)
    lora = t2v.find(tmp_path / "lora.safetensors", tensors)
    same_as_theirs(
        t2v.merged(lora), fused(wan_of_diffusers(T2V), t2v, tmp_path / "lora.safetensors"), T2V
    )


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_diffusers_fuses_our_lora_with_our_alpha(t2v, tmp_path, layout):
    pytest.importorskip("peft")
    params = our_lora()
    file = write_lora(LowRank(params, 3, 6.0), tmp_path / "out", layout)
    whole = official(merge(t2v.params, params, SimpleNamespace(rank=3, alpha=6.0)), T2V)
    same_as_theirs(
        {k: np.asarray(v) for k, v in whole.items()}, fused(wan_of_diffusers(T2V), t2v, file), T2V
    )
    if layout == "diffusers":
        module = wan_of_diffusers(T2V)
        module.load_state_dict(to_diffusers(t2v.params, T2V), strict=True)
        module.load_lora_adapter(str(file.parent), weight_name=file.name)
        module.fuse_lora()
        module.unload_lora()
        same_as_theirs({k: np.asarray(v) for k, v in whole.items()}, module, T2V)
