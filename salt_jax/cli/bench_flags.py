"""The flags of launch.bench. No jax in here: an invalid value is refused at once."""

from typing import Literal

from absl import flags
from ml_collections import config_flags

from salt_jax.cli.app import find_config, name_files, read_config, refuse_flags
from salt_jax.errors import UserError
from salt_jax.keys import Config
from salt_jax.models.presets import PRESETS, TEXT_PRESETS, Kernel

VAES = ("wan2.1", "tiny")  # the presets of models.vae, which needs jax
PARTS = ("teacher_forward", "student_step", "critic_step", "streaming", "vae")
# not timed unless they are named: one kernel of attention each, in the shapes of the student
KERNELS: tuple[Kernel | Literal["tokamax"], ...] = ("plain", "blocks", "cudnn", "splash", "tokamax")
PEER_PARTS = ("forward", "gradient", "rollout", "decode")
CONFIG = config_flags.DEFINE_config_file(
    "config",
    find_config("--config=configs/self_forcing.py:wan").partition("=")[2],
    "the run whose parts are timed; see configs/",
    lock_config=True,
)
PRESET = flags.DEFINE_enum(
    "preset", None, list(PRESETS), "preset of all networks, in place of the config's"
)
FRAMES = flags.DEFINE_integer("frames", None, "latent frames of a clip", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", None, "latent rows", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", None, "latent columns", lower_bound=1)
CLIPS = flags.DEFINE_integer(
    "clips", None, "clips of an update; default one for each device", lower_bound=1
)
VAE = flags.DEFINE_enum("vae", "wan2.1", VAES, "sizes of the VAE")
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 4, "network evaluations of a chunk in streaming", lower_bound=1
)
WEIGHTS_DTYPE = flags.DEFINE_enum(
    "weights_dtype",
    "bfloat16",
    ("float32", "bfloat16"),
    "type of a teacher timed alone and of a student that generates; updates use "
    "config.teacher.dtype",
)
MATMUL = flags.DEFINE_integer(
    "matmul",
    None,
    "side of the reference product; default 8192, on a CPU 1024",
    lower_bound=1,
)
WHAT = flags.DEFINE_list(
    "what",
    None,
    f"parts to time, default {','.join(PARTS)}, with --peer {','.join(PEER_PARTS)}; also "
    f"attention_KERNEL of {', '.join(KERNELS)}. One alone gives its own peak of accelerator memory",
)
RUNS = flags.DEFINE_integer("runs", 5, "runs of each part, after one to warm up", lower_bound=1)
PEER = flags.DEFINE_enum(
    "peer",
    None,
    ["diffusers"],
    "time ours and this one's network in turns, after a check that their results agree, and print "
    "the ratios; needs torch and diffusers. On a CPU without a size: wan2.1-t2v-small in float32",
)
COMPILE = flags.DEFINE_bool("compile", False, "time the peer under torch.compile too")
JSON = flags.DEFINE_string("json", None, "a file to write the numbers to")
name_files(JSON)


def read_wanted() -> tuple[Config, list[str]]:
    """The config with what the flags change, but for the number of clips; and the parts to time.

    Raises:
      UserError: there is no part of that name, or the config has no latents that have a size.
    """
    parts = list(PEER_PARTS if PEER.value else PARTS)
    what = WHAT.value or [*parts]
    parts += [] if PEER.value else [f"attention_{kernel}" for kernel in KERNELS]
    if set(what) - set(parts):
        raise UserError(f"--what={','.join(what)} has parts other than {', '.join(parts)}")
    alone = dict.fromkeys(("clips", "weights_dtype", "matmul"), ("alone",))
    modes = {"alone": "parts of ours alone", "peer": "ours beside a peer (--peer)"}
    refuse_flags("peer" if PEER.value else "alone", modes, {"compile": ("peer",)} | alone)
    config = read_config(CONFIG).copy_and_resolve_references()
    config.weights = config.init_from = ""
    config.init_critic = False
    if PRESET.value:
        use_preset(config, PRESET.value)
    sizes = (FRAMES.value, HEIGHT.value, WIDTH.value)
    if any(sizes):
        if config.data.kind != "latents":
            raise UserError(
                "--frames, --height and --width are of latents, and this config has none; drop them"
            )
        config.data.clip = tuple(
            new or old for new, old in zip(sizes, config.data.clip, strict=True)
        )
    return config, what


def use_preset(config: Config, preset: str) -> None:
    """All networks of this size, with a text encoder that fits."""
    config.model.preset, config.teacher.preset, config.teacher.weights = preset, "", ""
    fits = [name for name, t in TEXT_PRESETS.items() if t.dim == PRESETS[preset].text_dim]
    config.text_encoder = fits[0]
