"""python -m launch.sample: the program is in salt_jax/cli/sample.py."""

from salt_jax.cli import sample

if __name__ == "__main__":
    sample.run()
