"""The small networks that come with the package, by name: "shapes_teacher", "shapes_causal"."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "assets"


def located(where: str | Path) -> Path:
    """The file of the shipped asset of this name; any other path as it is, "./NAME" too."""
    file = FOLDER / f"{where}.safetensors"
    return file if str(where).isidentifier() and file.is_file() else Path(where)
