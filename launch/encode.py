"""python -m launch.encode: the program is in salt_jax/cli/encode.py."""

from salt_jax.cli import encode

if __name__ == "__main__":
    encode.run()
