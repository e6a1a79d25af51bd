"""python -m launch.claims --rows=DIR --against=ROW

For each row of DIR (DIR/ROW/SEED/evaluation.json of launch.evaluate, as launch/results.sh writes
them) what it has more than the row --against, by number of steps, with the interval in which 95 %
of bootstrap draws over seeds and clips are, as a Markdown table. Runs of the same seed and clips of
the same number are compared with each other.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags

from salt_jax.cli.app import run_main
from salt_jax.errors import UserError
from salt_jax.evaluate.intervals import bootstrap, verdict

FOLDER = flags.DEFINE_string("rows", None, "where rows are", required=True)
AGAINST = flags.DEFINE_string(
    "against", None, "the row that others are compared with", required=True
)
OF = flags.DEFINE_string("compared", "all", "what is compared: all, sharpness or motion")
PATH = flags.DEFINE_string("clips_of", "cm", "solver of the clips")


def values(row: Path) -> dict[int, dict[str, np.ndarray]]:
    """By seed and by number of steps, [N] each."""
    found = {}
    for file in sorted(row.glob("*/evaluation.json")):
        read = json.loads(file.read_text())["student"][PATH.value]["each"]
        found[int(file.parent.name)] = {k: np.array(v[OF.value]) for k, v in read.items()}
    return found


def line(name: str, row: Mapping, base: Mapping) -> str:
    """A row of the table."""
    cells, seeds = [], sorted(set(row) & set(base))
    for k in base[seeds[0]]:
        mine = bootstrap(np.stack([row[seed][k] for seed in seeds]))
        more = bootstrap(np.stack([row[seed][k] - base[seed][k] for seed in seeds]))
        spread = f"({more.low:+.3f} to {more.high:+.3f})"
        cells.append(f"{mine.mean:.3f} | {more.mean:+.3f} {spread}, {verdict(more)}")
    return f"| {name} | {len(seeds)} | {' | '.join(cells)} |"


def main(_):
    folder = Path(FOLDER.value)
    rows = {path.name: values(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    rows = {name: row for name, row in rows.items() if row}
    base = rows.get(AGAINST.value)
    if not base:
        raise UserError(f"{folder} has no row {AGAINST.value!r}, but {', '.join(rows) or 'none'}")
    steps = list(next(iter(base.values())))
    titles = " | ".join(f"{OF.value}, {k} steps | more than {AGAINST.value}" for k in steps)
    print(f"| row | seeds | {titles} |\n|{'---|' * (2 + 2 * len(steps))}")
    for name, row in rows.items():
        if set(row) & set(base):
            print(line(name, row, base))


if __name__ == "__main__":
    run_main(main)
