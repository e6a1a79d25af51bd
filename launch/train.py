"""python -m launch.train: the program is in salt_jax/cli/train.py."""

from salt_jax.cli import train

if __name__ == "__main__":
    train.run()
