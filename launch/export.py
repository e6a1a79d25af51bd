"""python -m launch.export: the program is in salt_jax/cli/export.py."""

from salt_jax.cli import export

if __name__ == "__main__":
    export.run()
