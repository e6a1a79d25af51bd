"""python -m launch.export --workdir=DIR --dst=FILE.safetensors

Writes the averaged network of a workdir, with its text encoder, as one file that `config.weights` can name. Stored as
float16: half the size, and the rounding is far below the network's own error.
"""

from pathlib import Path

from absl import flags

from launch.common import open_workdir, run_main
from salt_jax.errors import UserError
from salt_jax.models.weights import save_weights
from salt_jax.train.recipe import to_json

WORKDIR = flags.DEFINE_string("workdir", None, "what launch.train wrote", required=True)
DST = flags.DEFINE_string("dst", None, "the file to write", required=True)


def main(_):
    run = open_workdir(WORKDIR.value)
    if run.recipe.data.kind == "latents":
        raise UserError(
            f"{WORKDIR.value} is of Wan 2.1: launch.convert_wan --src={WORKDIR.value} --to=... writes it"
        )
    tree = {"wan": run.params, "text_encoder": run.weights["text_encoder"]}
    Path(DST.value).parent.mkdir(parents=True, exist_ok=True)
    save_weights(DST.value, tree, "float16", {"config": to_json(run.recipe)})
    print(f"wrote {DST.value}")


if __name__ == "__main__":
    run_main(main)
