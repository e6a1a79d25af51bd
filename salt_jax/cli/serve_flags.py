"""The flags of launch.serve. No jax in here."""

from absl import flags

from salt_jax.cli.app import name_files

MODEL = flags.DEFINE_multi_string(
    "model",
    ["shapes_causal"],
    "a workdir, a file of launch.export, a converted student or the name of a shipped network; "
    "give it twice to see two students side by side",
)
PARTS = flags.DEFINE_string(
    "weights", "", "of Wan 2.1: the folder with text encoder and VAE of a student"
)
RECIPE = flags.DEFINE_string(
    "recipe", "", "of a converted student: what it was trained at, as in launch.sample"
)
TINY_DECODER = flags.DEFINE_string(
    "tiny_decoder", "", "of Wan 2.1: as in launch.sample, in place of the VAE"
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 is every one")
PORT = flags.DEFINE_integer("port", 8000, "0: any that is free", lower_bound=0, upper_bound=65535)
TOKEN = flags.DEFINE_string(
    "token", "", "what the page's address must have; made up where others can reach the server"
)
NAMES = flags.DEFINE_multi_string(
    "name", [], "another name that this server is reached by, such as that of a proxy"
)
VIEWERS = flags.DEFINE_integer("viewers", 16, "connected at once", lower_bound=1)
SLOTS = flags.DEFINE_integer(
    "slots", 2, "viewers whose videos are made at once; the others wait", lower_bound=1
)
TURN = flags.DEFINE_float(
    "turn", 30.0, "seconds that one keeps its slot while others wait", lower_bound=1.0
)
LONGEST = flags.DEFINE_float("longest", 600.0, "seconds of a video", lower_bound=1.0)
KEPT = flags.DEFINE_integer(
    "kept_mib",
    256,
    "memory of a video's earlier states, from which it can be forked",
    lower_bound=1,
)
name_files(PARTS, TINY_DECODER)
