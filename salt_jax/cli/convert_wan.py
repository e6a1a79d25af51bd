"""python -m launch.convert_wan --src=DIR_OR_FILE --dst=DIR [--key=NAME] [--dtype=bfloat16]
                            [--lora=FILE[,FILE] [--lora_strength=0.8[,1]] [--keep_lora]]
python -m launch.convert_wan --to=official|diffusers|comfyui|pt --src=DIR_OR_FILE --dst=DIR
                            [--keep_lora] [--dtype=...]

Reads Wan 2.1 as others store it: the official release, the Diffusers layout, ComfyUI's files, a .pt
of the Self Forcing family, and LoRAs in the spellings of PEFT, Diffusers, ComfyUI, kohya and
LightX2V; the names in a file show what it is. With --to the other way: a converted transformer, the
averaged student of a workdir, or a LoRA (a kept lora.safetensors; the adapter of a workdir with
--keep_lora), for the official code, ComfyUI and Diffusers. --to=pt writes the file of the Self
Forcing family and of Salt's release: generator, generator_ema and critic of a workdir. One array is
in memory at a time, of a workdir up to two networks.
"""

from salt_jax.cli.app import run_main
from salt_jax.cli.convert_flags import read_wanted


def main(_):
    wanted = read_wanted()
    # jax comes here, after all that can be refused without it
    from salt_jax.cli.converting import convert

    convert(wanted)


def run() -> None:
    """The program."""
    run_main(main, __doc__)
