"""python -m launch.bench: the program is in salt_jax/cli/bench.py."""

from salt_jax.cli import bench

if __name__ == "__main__":
    bench.run()
