"""launch.convert_wan as a user runs it: releases in, students out, mistakes in one line with
nothing left behind.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from salt_jax.checkpoint import open_checkpoints, save
from salt_jax.config.reading import read_recipe, to_json
from salt_jax.convert.torch_files import read_torch
from salt_jax.convert.writing import Transformer, writers
from salt_jax.io import model_folder
from salt_jax.io.header import read_metadata
from salt_jax.io.model_folder import open_part
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import TensorWriter, view, write_tensors
from salt_jax.models import image_encoder, text_encoder, vae
from salt_jax.models.lora import init_lora
from salt_jax.models.presets import PRESETS
from salt_jax.state import init_learner, init_state
from salt_jax.workdir import open_networks
from tests.convert.networks import I2V, T2V, from_table, lora_file, official, save_torch
from tests.convert.pickles import Shell
from tests.helpers import ROOT, randomised, same_bits, shapes_of
from tests.launch.programs import program as run_program

CONFIGS = {
    model_folder.WAN: I2V,
    model_folder.VAE: vae.PRESETS["tiny"],
    model_folder.TEXT: text_encoder.PRESETS["wan-tiny"],
    model_folder.IMAGE: image_encoder.PRESETS["tiny"],
}
TABLES = {
    model_folder.VAE: "vae",
    model_folder.TEXT: "text_encoder",
    model_folder.IMAGE: "image_encoder",
}


def program(*args):
    return run_program("convert_wan", *args)


def succeed(*args):
    done = program(*args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def refused(dst, *args, told):
    done = program(*args, f"--dst={dst}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert told in last, last
    assert not dst.exists() or not list(dst.iterdir()), "something is left"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def release(tmp_path):
    """A folder like the official image-to-video release, small, and the trees in it by part."""
    folder = tmp_path / "Wan2.1"
    trees = {part: randomised(shapes_of(config, part.init), 1) for part, config in CONFIGS.items()}
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "xlm-roberta-large").mkdir()
    tensors = official(trees[model_folder.WAN], I2V)
    for k in range(3):
        shard = {name: w for i, (name, w) in enumerate(sorted(tensors.items())) if i % 3 == k}
        save_file(shard, folder / f"diffusion_pytorch_model-{k + 1:05d}-of-00003.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "num_attention_heads": 2}))
    for name, part in (
        ("Wan2.1_VAE", model_folder.VAE),
        ("models_t5_umt5-xxl-enc-bf16", model_folder.TEXT),
        ("models_clip", model_folder.IMAGE),
    ):
        save_torch(
            folder / f"{name}.pth",
            from_table(TABLES[part], "official", with_last(part, trees[part])),
        )
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text('{"umT5": true}')
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(b"umT5")
    (folder / "xlm-roberta-large" / "tokenizer.json").write_text('{"umT5": false}')
    (folder / "README.md").write_text("...")
    save_torch(folder / "xlm-roberta-large" / "other.pth", {"x": np.ones(3, np.float32)})
    return folder, trees


def with_last(part, tree):
    """CLIP files hold one layer more than what is used."""
    if part != model_folder.IMAGE:
        return tree
    longer = lambda leaf: np.concatenate([leaf, 9 + leaf[:1]])
    return tree | {"blocks": jax.tree.map(longer, tree["blocks"])}


def parts_are(folder, trees, dtype=None):
    for part, tree in trees.items():
        config, found = open_part(part, model_folder.Source(str(folder)))
        assert config == CONFIGS[part]
        same_bits(found, tree if dtype is None else jax.tree.map(lambda w: w.astype(dtype), tree))


@pytest.mark.slow
def test_a_release_becomes_a_folder_of_ours(release, tmp_path):
    folder, trees = release
    told = succeed(f"--src={folder}", f"--dst={tmp_path / 'out'}")
    parts_are(tmp_path / "out", trees)
    names = {part.file for part in trees} | {"tokenizer.json", "spiece.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"umT5": true}'
    assert "not used" in told and "other.pth" in told
    for path in (*folder.glob("*.pth"), *folder.glob("*.safetensors")):
        assert f"{digest(path)}  {path}" in told
    source = json.loads(read_metadata(tmp_path / "out" / "vae.safetensors")["source"])
    assert source["sha256"] == {"Wan2.1_VAE.pth": digest(folder / "Wan2.1_VAE.pth")}
    assert (
        len(json.loads(read_metadata(tmp_path / "out" / "wan.safetensors")["source"])["sha256"])
        == 3
    )


@pytest.mark.slow
def test_what_went_out_in_either_layout_comes_back_bit_for_bit(release, tmp_path):
    folder, trees = release
    succeed(f"--src={folder}", f"--dst={tmp_path / 'a'}")
    for layout in ("official", "diffusers"):
        out, back = tmp_path / layout, tmp_path / f"{layout} back"
        src = tmp_path / "a" if layout == "official" else tmp_path / "a" / "wan.safetensors"
        succeed(f"--to={layout}", f"--src={src}", f"--dst={out}")
        succeed(f"--src={out}", f"--dst={back}")
        parts_are(back, {model_folder.WAN: trees[model_folder.WAN]})
    refused(
        tmp_path / "none",
        "--to=official",
        f"--src={folder}",
        told="is neither a converted folder nor a workdir",
    )
    # A student replaces the transformer of a folder and leaves the rest; --dtype rounds.
    student = randomised(shapes_of(T2V), 7)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text('{"num_heads": 2}')
    tensors = {f"model.{name}": w for name, w in official(student, T2V).items()}
    pt = save_torch(tmp_path / "student" / "self_forcing_dmd.pt", {"generator_ema": tensors})
    succeed(f"--src={pt}", f"--dst={tmp_path / 'a'}", "--dtype=bfloat16")
    config, found = open_part(model_folder.WAN, model_folder.Source(str(tmp_path / "a")))
    assert config == T2V
    same_bits(found, jax.tree.map(lambda w: w.astype(jnp.bfloat16), student))
    parts_are(
        tmp_path / "a", {part: tree for part, tree in trees.items() if part != model_folder.WAN}
    )


@pytest.mark.slow
def test_a_lora_is_merged_or_kept(tmp_path):
    params = randomised(shapes_of(T2V), 1)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    pt = save_torch(tmp_path / "longlive_base.pt", {"generator": official(params, T2V)})
    lora, matrices = lora_file(tmp_path / "lora.pt", params, 4)
    arguments = [f"--src={pt}", f"--lora={lora}"]
    assert "rank 4, alpha 4, 20 matrices" in succeed(*arguments, f"--dst={tmp_path / 'merged'}")
    succeed(*arguments, f"--dst={tmp_path / 'kept'}", "--keep_lora")
    same_bits(open_part(model_folder.WAN, model_folder.Source(str(tmp_path / "kept")))[1], params)
    kept = load_file(tmp_path / "kept" / "lora.safetensors")
    merged = load_file(tmp_path / "merged" / "wan.safetensors")
    told = json.loads(read_metadata(tmp_path / "kept" / "lora.safetensors")["config"])
    assert told == {"rank": 4, "alpha": 4.0}
    product = kept["blocks/ffn_in/kernel/lora_a"] @ kept["blocks/ffn_in/kernel/lora_b"]
    np.testing.assert_allclose(
        merged["blocks/ffn_in/kernel"], params["blocks"]["ffn_in"]["kernel"] + product, atol=1e-5
    )
    down = matrices["base_model.model.blocks.1.ffn.0.lora_A.weight"]
    np.testing.assert_array_equal(kept["blocks/ffn_in/kernel/lora_a"][1], down.T)
    refused(tmp_path / "x", f"--src={pt}", f"--lora={pt}", told="is no LoRA of this network")
    refused(
        tmp_path / "x",
        f"--src={pt}",
        "--keep_lora",
        told="--keep_lora has no meaning without --lora",
    )
    refused(tmp_path / "x", *arguments, "--to=official", told="--lora is for taking files in")


@pytest.mark.slow
def test_the_averaged_student_of_a_workdir_goes_out_alone_or_with_the_others(tmp_path):
    config = base.get_config()
    recipe = read_recipe(config)
    start, average, critic = (randomised(shapes_of(recipe.wan), seed) for seed in (1, 2, 3))
    learner = lambda tree: init_learner(jax.tree.map(jnp.asarray, tree), optax.sgd(0.1))
    state = init_state({"student": learner(start), "critic": learner(critic)})
    state = replace(state, iteration=jnp.int32(1), ema=jax.tree.map(jnp.asarray, average))
    with open_checkpoints(tmp_path / "run", 1) as manager:
        save(manager, state, {"config": to_json(recipe)})
    (tmp_path / "run" / "config.json").write_text(to_json(recipe))
    succeed("--to=official", f"--src={tmp_path / 'run'}", f"--dst={tmp_path / 'out'}")
    same_bits(
        load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"),
        official(average, recipe.wan),
    )
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["dim"], told["num_heads"], told["text_len"]) == (192, 4, 32)
    succeed("--to=pt", f"--src={tmp_path / 'run'}", f"--dst={tmp_path / 'pt'}")
    found = read_torch(tmp_path / "pt" / "model.pt")
    for key, tree in (("generator", start), ("generator_ema", average), ("critic", critic)):
        tensors = {name: view(stored) for name, stored in found.pop(key).items()}
        same_bits(tensors, {f"model.{k}": w for k, w in official(tree, recipe.wan).items()})
    assert not found
    for flag in ("--average=none", "--keep_lora"):
        refused(
            tmp_path / "none", "--to=pt", f"--src={tmp_path / 'run'}", flag, told="leave out --"
        )


def other_lora(path, **header):
    """A LoRA of every matrix with diffusers' names and metadata, and what it adds to one of
    them.
    """
    params, tensors = randomised(shapes_of(T2V), 1), {}
    rng = np.random.default_rng(5)
    for name, w in official(params, T2V).items():
        if name.startswith("blocks.") and w.ndim == 2:
            layer = "transformer." + name.removesuffix(".weight")
            tensors[f"{layer}.lora_A.weight"] = rng.standard_normal((4, w.shape[1])).astype(
                np.float32
            )
            tensors[f"{layer}.lora_B.weight"] = rng.standard_normal((w.shape[0], 4)).astype(
                np.float32
            )
    told = json.dumps({f"transformer.{k}": v for k, v in header.items()})
    save_file(tensors, path, {"lora_adapter_metadata": told})
    front = "transformer.blocks.1.ffn.0"
    return tensors[f"{front}.lora_B.weight"].astype(float) @ tensors[f"{front}.lora_A.weight"]


@pytest.mark.slow
def test_loras_with_strengths_are_merged_recorded_kept_and_given_back(tmp_path):
    params = randomised(shapes_of(T2V), 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"num_heads": 2}')
    record = '{"step": 3}'
    src = tmp_path / "in" / "wan.safetensors"
    save_file(official(params, T2V), src, {"salt_jax": record})
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one, two = other_lora(a, r=4, lora_alpha=16), other_lora(b, r=4, lora_alpha=4, use_rslora=True)
    told = succeed(
        f"--src={src}", f"--lora={a},{b}", "--lora_strength=0.5,-1", f"--dst={tmp_path / 'merged'}"
    )
    assert "rank 4, alpha 16, 20 matrices, strength 0.5" in told and "strength -1" in told
    got = load_file(tmp_path / "merged" / "wan.safetensors")["blocks/ffn_in/kernel"][1]
    want = params["blocks"]["ffn_in"]["kernel"][1] + (0.5 * 4 * one - 2 * two).T
    np.testing.assert_allclose(got, want, atol=2e-5)
    metadata = read_metadata(tmp_path / "merged" / "wan.safetensors")
    source = json.loads(metadata["source"])
    assert metadata["salt_jax"] == record and source["student"] == ""
    assert source["lora"] == [
        {
            "file": "a.safetensors",
            "sha256": digest(a),
            "strength": 0.5,
            "rank": [4],
            "alpha": [16.0],
        },
        {
            "file": "b.safetensors",
            "sha256": digest(b),
            "strength": -1.0,
            "rank": [4],
            "alpha": [8.0],
        },
    ]
    arguments = [f"--src={src}", f"--lora={a}", "--lora_strength=0.5"]
    succeed(*arguments, "--keep_lora", f"--dst={tmp_path / 'kept'}")
    kept = tmp_path / "kept" / "lora.safetensors"
    assert json.loads(read_metadata(kept)["config"]) == {"rank": 4, "alpha": 8.0}
    assert json.loads(read_metadata(kept)["source"])["lora"][0]["strength"] == 0.5
    succeed("--to=diffusers", f"--src={kept}", f"--dst={tmp_path / 'out'}")
    (file,) = (tmp_path / "out").iterdir()
    succeed(f"--src={src}", f"--lora={file}", f"--dst={tmp_path / 'again'}")
    again = load_file(tmp_path / "again" / "wan.safetensors")["blocks/ffn_in/kernel"][1]
    np.testing.assert_allclose(
        again, params["blocks"]["ffn_in"]["kernel"][1] + 0.5 * 4 * one.T, atol=2e-5
    )
    none = tmp_path / "none"
    refused(none, "--to=official", f"--src={kept}", told="is a LoRA; write it with --to=diffusers")
    refused(
        none, "--to=comfyui", f"--src={tmp_path / 'again'}", told="ComfyUI reads with --to=official"
    )
    refused(none, *arguments[:2], "--lora_strength=1,2", told="does not give 1 finite numbers")
    refused(none, *arguments[:2], "--lora_strength=nan", told="does not give 1 finite numbers")
    refused(none, *arguments[:2], "--lora_strength=much", told="is no number")
    refused(
        none,
        f"--src={src}",
        f"--lora={a}",
        f"--lora={b}",
        "--keep_lora",
        told="--keep_lora keeps one LoRA",
    )


@pytest.mark.slow
def test_the_adapter_of_a_workdir_goes_out(tmp_path):
    config = base.get_config()
    config.lora.update(rank=2, alpha=6.0)
    recipe = read_recipe(config)
    start = {"blocks": randomised(shapes_of(recipe.wan), 1)["blocks"]}
    lora = randomised(init_lora(jax.random.key(0), start, 2), 3)
    other = randomised(lora, 4)
    learner = lambda tree: init_learner(jax.tree.map(jnp.asarray, tree), optax.sgd(0.1))
    state = init_state({"student": learner(lora), "critic": learner(other)})
    with open_checkpoints(tmp_path / "run", 1) as manager:
        save(manager, replace(state, iteration=jnp.int32(1)), {"config": to_json(recipe)})
    (tmp_path / "run" / "config.json").write_text(to_json(recipe))
    succeed("--to=comfyui", "--keep_lora", f"--src={tmp_path / 'run'}", f"--dst={tmp_path / 'out'}")
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    kernel = lora["blocks"]["cross_attn"]["k"]["kernel"]
    front = "diffusion_model.blocks.3.cross_attn.k"
    np.testing.assert_array_equal(tensors[f"{front}.lora_down.weight"], kernel["lora_a"][3].T)
    np.testing.assert_array_equal(tensors[f"{front}.lora_up.weight"], kernel["lora_b"][3].T)
    assert tensors[f"{front}.alpha"] == 6
    # a .pt has whole networks: the adapters are merged, with alpha / rank
    base_kernel = load_file(located(recipe.weights))["wan/blocks/cross_attn/k/kernel"]
    found = dict(open_networks(tmp_path / "run"))
    assert found.keys() == {"generator", "generator_ema", "critic"}
    for key, tree in (("generator", lora), ("generator_ema", lora), ("critic", other)):
        pair = tree["blocks"]["cross_attn"]["k"]["kernel"]
        np.testing.assert_allclose(
            found[key]["blocks"]["cross_attn"]["k"]["kernel"],
            base_kernel + 3 * pair["lora_a"] @ pair["lora_b"],
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.slow
def test_a_key_chooses_and_what_was_chosen_is_told_and_kept(tmp_path):
    params = randomised(shapes_of(T2V), 1)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    average = {k: 0 * v for k, v in official(params, T2V).items()}
    pt = save_torch(
        tmp_path / "x.pt", {"generator_ema": average, "generator": official(params, T2V)}
    )
    for key in ("generator_ema", "generator"):
        told = succeed(
            f"--src={pt}",
            f"--dst={tmp_path / key}",
            *([] if key == "generator_ema" else [f"--key={key}"]),
        )
        assert f"official names, {key} of the file" in told
        assert (
            json.loads(read_metadata(tmp_path / key / "wan.safetensors")["source"])["student"]
            == key
        )
        succeed("--to=pt", f"--src={tmp_path / key}", f"--dst={tmp_path / 'pt' / key}")
        assert read_torch(tmp_path / "pt" / key / "model.pt").keys() == {key}
    same_bits(
        open_part(model_folder.WAN, model_folder.Source(str(tmp_path / "generator")))[1], params
    )
    refused(
        tmp_path / "none",
        f"--src={pt}",
        "--key=ema",
        told="no network under --key=ema; there is generator_ema",
    )


@pytest.mark.slow
def test_umt5_of_comfyui_brings_its_tokenizer(tmp_path):
    config = text_encoder.PRESETS["wan-tiny"]
    tree = randomised(shapes_of(config, text_encoder.init_text_encoder), 1)
    tensors = from_table("text_encoder", "diffusers", tree) | {
        "spiece_model": np.frombuffer(b"umT5", np.uint8)
    }
    save_file(tensors, tmp_path / "umt5_xxl_fp16.safetensors")
    told = succeed(f"--src={tmp_path / 'umt5_xxl_fp16.safetensors'}", f"--dst={tmp_path / 'out'}")
    assert (
        tmp_path / "out" / "spiece.model"
    ).read_bytes() == b"umT5" and "spiece.model from" in told


@pytest.mark.slow
@pytest.mark.parametrize("place", [".", "out", "..", "link"])
def test_a_place_inside_of_what_is_read_or_around_it_is_refused(tmp_path, place):
    src = tmp_path / "a" / "src"
    src.mkdir(parents=True)
    (tmp_path / "link").symlink_to(src)
    dst = tmp_path / "link" / "out" if place == "link" else src / place
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--to=official"]) if place == "." else ([],):
        done = program(f"--src={src}", f"--dst={dst}", *more)
        assert done.returncode == 2 and "lie in each other; name a folder apart" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_mistake_is_told_in_a_line_and_leaves_nothing(release, tmp_path):
    folder, _ = release
    dst, marker = tmp_path / "dst", tmp_path / "was_here"
    refused(dst, f"--src={tmp_path / 'nowhere'}", told="there is no")
    refused(dst, f"--src={folder / 'xlm-roberta-large'}", told="holds none of wan, vae")
    refused(dst, "--to=official", f"--src={tmp_path / 'nowhere'}", told="there is no")
    refused(dst, f"--src={folder / 'google'}", told="there are no weights in it")
    pth = folder / "Wan2.1_VAE.pth"
    whole = pth.read_bytes()
    pth.write_bytes(whole[: len(whole) // 2])
    refused(dst, f"--src={folder}", told="Wan2.1_VAE.pth")
    save_torch(pth, {"a": np.ones(2, np.float32)})
    evil = pickle.dumps({"a": Shell(os.system, f"touch {marker}")}, 2)
    with zipfile.ZipFile(folder / "models_clip.pth", "w") as file:
        file.writestr("archive/data.pkl", evil)
    refused(dst, f"--src={folder}", told="models_clip.pth is refused: it asks for 'posix system'")
    assert not marker.exists()


MEASURE = """
import resource, sys
from salt_jax.cli import convert_wan
from salt_jax.cli.app import run_main
try:
    run_main(convert_wan.main)
except SystemExit as end:
    assert not end.code, end.code
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["in", "out"])
def test_memory_does_not_grow_with_the_model(tmp_path, direction):
    """340 MB in one file, in arrays of at most 14 MB: what is needed above a tiny model is a few
    arrays.
    """
    peaks, large = (
        {},
        replace(PRESETS["wan2.1-t2v-1.3b"], dim=768, num_heads=6, num_layers=9, ffn_dim=3072),
    )
    for name, config in (("tiny", T2V), ("large", large)):
        src = tmp_path / name
        src.mkdir()
        zeros = writers(Transformer(config, shapes_of(config)), "official", None)
        zeros = {
            k: TensorWriter(a.dtype, a.shape, lambda a=a: [np.zeros(a.shape, a.dtype)])
            for k, a in zeros.items()
        }
        write_tensors(src / "diffusion_pytorch_model.safetensors", zeros, {})
        (src / "config.json").write_text(json.dumps({"num_heads": config.num_heads}))
        runs = [
            [f"--src={src}", f"--dst={tmp_path / name}_ours"],
            ["--to=diffusers", f"--src={tmp_path / name}_ours", f"--dst={tmp_path / name}_out"],
        ]
        for arguments in runs[: 1 + (direction == "out")]:
            command = [sys.executable, "-c", MEASURE, *arguments]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
        peaks[name] = int(done.stdout.split("peak ")[1])
    size = (tmp_path / "large_ours" / "wan.safetensors").stat().st_size
    assert size > 300e6
    assert peaks["large"] - peaks["tiny"] < 80e6, peaks
