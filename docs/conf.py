"""The site: the documents as they stand in the repository, the notebook as it runs today, and a
page of docstrings for each room (reference.py).

    .venv/bin/sphinx-build -W --keep-going -c docs . build/docs    # -D nb_execution_mode=off

The notebook is committed with its outputs; after an edit, in examples/:

    PYTHONPATH=.. ../.venv/bin/jupyter execute --inplace quickstart.ipynb
"""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ["PYTHONPATH"] = str(ROOT)  # of the notebook

project = html_title = "salt_jax"
root_doc, html_theme = "README", "furo"
extensions = ["myst_nb", "sphinx.ext.viewcode", "reference"]
include_patterns = ["*.md", "docs/**", "examples/*.ipynb", "salt_jax/assets/README.md"]
exclude_patterns = [".*", "build", "runs", "SECURITY.md"]
CONTENTS = {  # where a page stands that is named nowhere else, a pattern finds it
    "Guide": ["examples/quickstart", "docs/guide", "docs/algorithm", "docs/wan", "docs/pods"]
    + ["docs/scaling", "docs/results", "docs/*", "salt_jax/assets/README", "*"],
    "Reference": ["docs/api/salt_jax", "docs/api/*"],
}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_in_temp = nb_execution_raise_on_error = True
nb_execution_timeout = 600
add_module_names = html_show_copyright = False
maximum_signature_line_length = 70


def adapt(app, docname: str, source: list[str]) -> None:
    """Links to sources lead to their pages; the README gets the table of contents."""
    link = r"\]\((?:\.\./)*(salt_jax/[\w/]+?)/?(?:\.py)?\)"
    source[0] = re.sub(link, lambda m: f"](#{m[1].replace('/', '.')})", source[0])
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            options = f":caption: {caption}\n:hidden:\n:titlesonly:\n:glob:\n"
            source[0] += "\n".join(["\n```{toctree}", options, *pages, "```\n"])


def add_index(app, error) -> None:
    if not error:
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app):
    app.connect("source-read", adapt)
    app.connect("build-finished", add_index)
