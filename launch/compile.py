"""python -m launch.compile: the program is in salt_jax/cli/compile.py."""

from salt_jax.cli import compile

if __name__ == "__main__":
    compile.run()
