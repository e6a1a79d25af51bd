"""python -m salt_jax.config.table: the keys of a config as the table of docs/guide.md."""

import dataclasses

from salt_jax.config.build import all_keys
from salt_jax.config.migrate import flat
from salt_jax.config.schema import Recipe


def table() -> str:
    """Markdown, one row a key."""
    defaults = flat(dataclasses.asdict(Recipe()))
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for path, field in all_keys(Recipe):
        value = defaults[path]
        shown = f'`"{value}"`' if isinstance(value, str) else f"`{value}`"
        doc = field.metadata["doc"]
        if field.metadata["must"]:
            doc = f"{doc}; {field.metadata['must'].words}" if doc else field.metadata["must"].words
        rows.append(f"| `{path}` | {shown} | {doc} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
