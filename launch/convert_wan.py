"""python -m launch.convert_wan: the program is in salt_jax/cli/convert_wan.py."""

from salt_jax.cli import convert_wan

if __name__ == "__main__":
    convert_wan.run()
