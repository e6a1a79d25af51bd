"""What launch.sample refuses, before jax is even imported: each in one sentence that names the flag
and the remedy.

All cases run in one process of their own, because programs define the same flags.
"""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from configs import base, salt, sc_dmd, self_forcing
from salt_jax.config.reading import read_recipe, to_json
from salt_jax.io.video import write_video
from salt_jax.models.presets import PRESETS
from tests.helpers import ROOT

SCRIPT = """
import json, sys
from absl import flags
from salt_jax.cli import request
from salt_jax.errors import UserError
told = []
for args in json.load(sys.stdin):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        flags.FLAGS(["sample", *args])
        asked = request.read_request()
        prefix = None if asked.prefix is None else len(asked.prefix)
        told.append({
            "mode": asked.mode, "shape": asked.shape, "prefix": prefix, "jobs": len(asked.jobs),
            "levels": {k: v.tolist() for k, v in asked.grids().items()},
            "solver": asked.sampler.solver, "first_steps": asked.sampler.first_steps,
            "memory": asked.policy and list(vars(asked.policy).values()),
            "guidance": asked.guidance,
            "switches": {k: v.prompt for k, v in asked.switches.items()},
            "index": str(asked.index),
        })
    except UserError as error:
        told.append(str(error))
assert "jax" not in sys.modules
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Workdirs with a config and no numbers, a converted folder that is a header, a picture and a
    clip.
    """
    folder = tmp_path_factory.mktemp("request")
    causal = self_forcing.get_config("wan")
    listed = base.get_config()
    listed.schedule.update(levels=(1000, 757, 522), train_levels=3, anchor_levels=3)
    listed.sample.num_steps = (3,)
    configs = {"shapes": base.get_config(), "chunks": salt.get_config(),
               "wan": sc_dmd.get_config("wan"),
               "wan_chunks": causal, "listed": listed}  # fmt: skip
    for name, config in configs.items():
        (folder / name / "checkpoints" / "20").mkdir(parents=True)
        (folder / name / "config.json").write_text(to_json(read_recipe(config)))
    for kind in ("i2v", "t2v"):
        (folder / kind).mkdir()
        told = {"config": json.dumps(asdict(PRESETS[f"wan2.1-{kind}-tiny"]))}
        save_file({"x": np.zeros(1, np.float32)}, folder / kind / "wan.safetensors", told)
    for name, key in (("average", "generator_ema"), ("regular", "generator"), ("alone", "")):
        (folder / name).mkdir()
        source = {"source": json.dumps({"told": "official names", "student": key})}
        save_file({"x": np.zeros(1, np.float32)}, folder / name / "wan.safetensors", told | source)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "picture.png")
    write_video(folder / "clip.mp4", np.zeros((30, 32, 48, 3), np.uint8))
    write_video(folder / "2_000.mp4", np.zeros((30, 32, 48, 3), np.uint8))
    (folder / "prompts.txt").write_text("\ufeffA cat.\r\n\nA dog\u2028runs.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ask(folder):
    """Every case of this file at once: args -> what came of them."""
    cases = [case for _, some in CASES.items() for case, *_ in some] + [case for case, _ in TAKEN]
    named = [[arg.replace("@", f"{folder}/") for arg in case] for case in cases]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        input=json.dumps(named),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(map(tuple, cases), json.loads(done.stdout), strict=True))


TINY = ["--preset_size=tiny", "--model=wan2.1-t2v-1.3b", "--prompt=A cat", "--out=o"]
SHAPES, CHUNKS = ["--workdir=@shapes"], ["--workdir=@chunks"]
WAN, WAN_CHUNKS = (["--workdir=@" + name, "--prompt=A cat"] for name in ("wan", "wan_chunks"))
T2V, I2V = (["--weights=@" + name, "--prompt=A cat", "--out=o"] for name in ("t2v", "i2v"))
OF_WAN = [
    "--size=64x48",
    "--chunk=3",
    "--student=x",
    "--model=wan2.1-t2v-1.3b",
    "--preset_size=tiny",
    "--recipe=causvid",
]
OTHERS = [
    *OF_WAN,
    "--weights=x",
    "--image=x",
    "--image_fit=crop",
    "--dtype=float32",
    "--tile=8",
    "--tiny_decoder=x",
    "--vbench=x",
    "--extended=x",
]
OF_CHUNKS = [
    "--memory=6:1:relative",
    "--first_steps=4",
    "--switch=9:A",
    "--flush",
    "--cut",
    "--prefix=x",
]
OF_RUNS = ["--levels=1000", "--step=3", "--average=none"]
name_of = lambda flag: flag.partition("=")[0]

# kind -> (arguments, what the one sentence says)
CASES = {
    "a flag of another mode": [
        *(([*SHAPES, flag], name_of(flag), "Moving Shapes")
          for flag in [*OTHERS, *OF_CHUNKS, "--frames=36"]),
        *(([*CHUNKS, flag], name_of(flag), "Moving Shapes") for flag in OTHERS),
        *(([*WAN, flag], name_of(flag), "workdir of Wan 2.1") for flag in OF_WAN + OF_CHUNKS),
        *(([*WAN_CHUNKS, flag], name_of(flag), "chunk by chunk") for flag in OF_WAN),
        *(([*T2V, flag], name_of(flag), "teacher") for flag in OF_CHUNKS + OF_RUNS),
        ([*T2V, "--student=@t2v", "--memory=6:1:relative"], "--memory", "--student"),
    ],
    "flags that do not go together": [
        ([*CHUNKS, "--flush"], "--flush", "--switch"),
        ([*CHUNKS, "--cut", "--switch=9:A"], "--cut", "relative"),
        ([*T2V, "--extended=x"], "--extended", "--vbench"),
        ([*T2V, "--vbench=x"], "--vbench", "--prompt"),
        ([*T2V, "--tile=8", "--tiny_decoder=x"], "--tile", "--tiny_decoder", "exclude"),
        ([*SHAPES, "--prompts_file=x", "--count=3"], "--count", "--prompts_file"),
        ([*SHAPES, "--prompts_file=x", "--prompt=A"], "--prompt", "exclude"),
        ([*SHAPES, "--levels=1000,500", "--num_steps=2"], "--levels", "--num_steps"),
        ([*SHAPES, "--negative_prompt=ugly"], "--negative_prompt", "--guidance"),
        ([*TINY, "--weights=x"], "--weights", "--preset_size"),
        ([*TINY, "--student=x"], "--student", "--preset_size"),
        (["--prompt=A"], "--weights=DIR", "--workdir=DIR"),
    ],
    "lengths that do not split": [
        ([*TINY, "--chunk=3", "--frames=13"], "--frames=13", "9 and 21"),
        ([*TINY, "--chunk=3", "--image=@picture.png", "--frames=81"], "--frames=81", "73 and 85"),
        ([*TINY, "--chunk=30", "--frames=81"], "--frames=81", "117"),
        ([*TINY, "--frames=10"], "--frames=10", "9 or 13"),
        ([*CHUNKS, "--frames=10"], "--frames=10", "9 and 12"),
        ([*WAN_CHUNKS, "--frames=85"], "--frames=85", "81 and 93"),
        ([*CHUNKS, "--frames=1026"], "--frames=1026", "1023"),
        ([*TINY, "--chunk=3", "--frames=4101"], "--frames=4101", "4089"),
        ([*TINY, "--frames=4097"], "--frames=4097", "4093"),
        ([*CHUNKS, "--switch=4:A"], "--switch", "3 and 6"),
        ([*TINY, "--chunk=3", "--switch=12:A"], "--switch", "9 and 21"),
        ([*CHUNKS, "--switch=3:A", "--switch=3:B"], "--switch", "twice"),
        ([*CHUNKS, "--switch=three:A"], "--switch", "FRAME:PROMPT"),
        ([*CHUNKS, "--prefix=@clip.mp4", "--frames=30"], "--frames=30", "at least 33"),
        ([*CHUNKS, "--prefix=@2_000.mp4", "--out=@"], "--prefix", "written over"),
    ],
    "another network than the recipe's": [
        ([*T2V, "--student=@regular", "--recipe=salt_cf"], "generator", "--key=generator_ema"),
        ([*T2V, "--student=@average", "--recipe=salt_ll"], "generator_ema", "--key=generator"),
    ],
    "what a model cannot": [
        (I2V, "--image=FILE", "needs"),
        ([*I2V, "--image=@picture.png", "--chunk=3"], "--chunk", "whole clips"),
        ([*T2V, "--image=@picture.png"], "--image", "models that read it"),
        ([*WAN_CHUNKS, "--image=@picture.png"], "--image", "memory.first"),
        ([*T2V, "--solver=cm"], "--solver=cm", "unipc"),
        ([*SHAPES, "--solver=unipc"], "--solver=unipc", "euler"),
        ([*SHAPES, "--levels=757,522"], "--levels", "990"),
        ([*SHAPES, "--levels=1000,1000"], "--levels", "falling"),
        ([*SHAPES, "--levels=high"], "--levels", "numbers"),
        (["--workdir=@listed", "--num_steps=4"], "--num_steps", "1000, 757, 522"),
        ([*TINY, "--recipe=causvid", "--num_steps=4"], "--num_steps", "1000, 757, 522"),
        ([*TINY, "--recipe=longlive", "--chunk=10"], "--chunk=10", "window=12"),
        ([*SHAPES, "--num_steps=0"], "--num_steps", "from 1 up"),
        ([*SHAPES, "--num_steps=²"], "--num_steps", "from 1 up"),
        ([*T2V, "--size=30x32"], "--size=30x32", "multiples of 16"),
        ([*T2V, "--size=0x0"], "--size=0x0", "multiples of 16"),
        ([*T2V, "--shift=0"], "--shift", "above"),
        ([*SHAPES, "--guidance=nan"], "--guidance", "finite"),
        ([*SHAPES, "--step=7"], "--step=7", "20"),
        ([*CHUNKS, "--memory=2:0:absolute"], "--memory", "window=2"),
        ([*CHUNKS, "--memory=9:3:cyclic"], "--memory", "need a period, such as 21"),
        ([*CHUNKS, "--memory=9:3:cyclic:20"], "--memory", "multiple of chunk=3"),
        ([*CHUNKS, "--memory=9:3:absolute:noisy"], "--memory", "'noisy', not one of clean, last"),
        ([*CHUNKS, "--memory=9:3:absolute:clean:9"], "--memory", "nothing stands behind clean"),
        ([*CHUNKS, "--memory=9:3:circular"], "--memory", "'circular', not one of absolute"),
        ([*CHUNKS, "--memory=9:3:cyclic:9", "--switch=9:A", "--cut"], "--cut", "relative"),
        ([*CHUNKS, "--levels=1000,500", "--first_steps=4"], "--levels", "--first_steps"),
        ([*TINY, "--recipe=causvid", "--first_steps=4"], "--first_steps", "1000, 757, 522"),
        (["--workdir=@nowhere"], "nowhere", "--workdir"),
        (["--weights=@nowhere", "--prompt=A", "--out=o"], "nowhere", "launch.convert_wan"),
        ([*T2V, "--model=wan2.1-t2v-14b"], "--model", "name its own"),
        ([*TINY[:1], "--model=dall-e"], "dall-e", "choose"),
        ([*T2V[:2]], "--out=DIR", "folder"),
        ([*T2V, "--out=@picture.png"], "picture.png", "--out=DIR"),
        ([*I2V, "--image=@nowhere.png"], "nowhere.png", ""),
        ([T2V[0], "--out=o"], "--prompt", "--prompts_file"),
    ],
}  # fmt: skip

# 1000, 750, 500, 250 at shift 5: t -> 5 t / (1 + 4 t)
WARPED = {"4": [5 * t / (1 + 4 * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]}
TAKEN = [
    ([*TINY, "--chunk=3", "--image=@picture.png"],
     {"shape": [19, 64, 96], "memory": [3, 1, 0, 0, "absolute", 0, "clean"]}),
    ([*TINY, "--chunk=3"],
     {"shape": [21, 60, 104], "levels": {"4": [1.0, 0.9375, 0.8333333, 0.625, 0.0]}}),
    ([*TINY, "--chunk=2"], {"shape": [20, 60, 104]}),
    ([*TINY, "--chunk=30"], {"shape": [30, 60, 104]}),
    ([*TINY], {"shape": [21, 60, 104], "guidance": 5.0, "solver": "unipc", "mode": "teacher"}),
    ([*TINY, "--recipe=causvid"],
     {"levels": {"3": [1.0, 0.757, 0.522, 0.0]}, "memory": [3, 3, 0, 0, "absolute", 0, "clean"]}),
    ([*TINY, "--recipe=longlive"],
     {"memory": [3, 3, 12, 3, "absolute", 0, "clean"], "mode": "student chunks"}),
    ([*TINY, "--recipe=longlive", "--memory=9:3:absolute"],
     {"memory": [3, 3, 9, 3, "absolute", 0, "clean"]}),
    ([*T2V, "--student=@average", "--recipe=salt_cf"],
     {"memory": [3, 3, 0, 0, "absolute", 0, "clean"], "solver": "cm", "guidance": 1.0,
      "levels": WARPED}),
    ([*T2V, "--student=@regular/wan.safetensors", "--recipe=salt_ll"],
     {"memory": [3, 3, 12, 3, "absolute", 0, "clean"], "solver": "cm", "guidance": 1.0,
      "levels": WARPED}),
    *(([*T2V, "--student=@alone", f"--recipe={name}"], {"mode": "student chunks"})
      for name in ("salt_cf", "salt_ll")),
    ([*TINY, "--chunk=3", "--levels=1000,500,0"], {"levels": {"2": [1.0, 0.5, 0.0]}}),
    ([*TINY, "--chunk=3", "--prefix=@clip.mp4"], {"shape": [27, 60, 104], "prefix": 21}),
    ([*CHUNKS, "--prefix=@clip.mp4"], {"shape": [39, 12, 12], "prefix": 30}),
    ([*CHUNKS, "--prefix=@clip.mp4", "--frames=33"], {"shape": [33, 12, 12], "prefix": 30}),
    ([*TINY, "--chunk=3", "--switch=33:It jumps."], {"switches": {"9": "It jumps."}}),
    ([*CHUNKS, "--frames=2001", "--memory=9:3:relative"], {"shape": [2001, 12, 12]}),
    ([*CHUNKS, "--frames=2001", "--memory=9:3:cyclic:9"],
     {"shape": [2001, 12, 12], "memory": [3, 3, 9, 3, "cyclic", 9, "clean"]}),
    ([*CHUNKS, "--memory=9:3:cyclic:9:last_step", "--num_steps=2", "--first_steps=4"],
     {"memory": [3, 3, 9, 3, "cyclic", 9, "last_step"], "first_steps": 4}),
    ([*TINY, "--recipe=longlive", "--memory=9:3:relative:last_step"],
     {"memory": [3, 3, 9, 3, "relative", 0, "last_step"], "first_steps": 0}),
    ([*CHUNKS, "--stream", "--seconds=30", "--memory=9:3:cyclic:9"],
     {"shape": [480, 12, 12], "jobs": 1, "levels": {"4": WARPED["4"]}}),
    (["--workdir=@listed"], {"levels": {"3": [1.0, 0.757, 0.522, 0.0]}}),
    (["--workdir=@listed", "--levels=1000,500"], {"levels": {"2": [1.0, 0.5, 0.0]}}),
    ([*SHAPES, "--prompts_file=@prompts.txt", "--num_steps=2,2"], {"jobs": 2}),
    ([*SHAPES, "--step=20", "--guidance=3", "--negative_prompt=A red circle moves left."],
     {"guidance": 3.0}),
]  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_what_is_refused_is_told_in_one_sentence(ask, kind):
    for args, *told in CASES[kind]:
        sentence = ask[tuple(args)]
        assert isinstance(sentence, str), f"{args} was taken: {sentence}"
        assert all(part in sentence for part in told) and "\n" not in sentence, (args, sentence)


def test_what_is_taken_and_what_defaults_are(ask):
    for args, expected in TAKEN:
        told = ask[tuple(args)]
        assert isinstance(told, dict), f"{args} was refused: {told}"
        for name, value in expected.items():
            got = told[name][:3] if name == "shape" else told[name]
            if name == "levels":
                assert got.keys() == value.keys()
                for k in value:
                    np.testing.assert_allclose(got[k], value[k], rtol=1e-6)
            else:
                assert got == value, (args, name, got)
