"""A page for each room of salt_jax, made of docstrings and signatures, as an extension of Sphinx.

Docstrings are Markdown, which autodoc does not read, so griffe reads the sources and Markdown is
made of them. Nothing is imported: annotations and fields stand on a page as they were written,
`x0: Latent` and not what Latent is short for.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import griffe
from sphinx.addnodes import pending_xref
from sphinx.util.logging import getLogger

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/api"
PACKAGE = griffe.load("salt_jax", search_paths=[ROOT])
NO_REFERENCE = ("cli",)  # programs, which the guide and --help tell of


def prose(obj) -> str:
    """A docstring: its sections as lists, its sessions fenced, its names as cross references."""
    text = obj.docstring.value if obj.docstring else ""
    listed = lambda lines: re.sub(r"^(\w+(?:, \w+)*): ", r"- **\1**: ", dedent(lines), flags=re.M)
    section = r"^(Args|Returns|Raises|Yields):\n((?: +.+\n?)+)"
    text = re.sub(section, lambda m: f"**{m[1]}**\n\n{listed(m[2])}", text, flags=re.M)
    text = re.sub(r"^(>>> (?:.+\n?)+)", r"```pycon\n\1\n```\n", text, flags=re.M)
    return re.sub(r"(?<!`)`([a-zA-Z_][\w.]*)`(?!`)", r"{py:obj}`\1`", text)


def code(text: str) -> str:
    return f"```python\n{dedent(text).strip()}\n```" if text.strip() else ""


def directive(kind: str, title: str, *body: str, fence: str = "`" * 6) -> str:
    return "\n\n".join([f"{fence}{{py:{kind}}} {title}", *body, fence])


def signature(function) -> str:
    return re.sub(r"\(self(, )?", "(", function.signature(), count=1)


def function(function) -> str:
    return directive("function", signature(function), prose(function))


def constant(attribute) -> str:
    return directive("data", attribute.name, prose(attribute), code(attribute.source))


def class_(found) -> str:
    """Fields stand as in the source, with their comments."""
    members = [m for m in found.members.values() if m.is_function or "property" in m.labels]
    members = [m for m in members if m.lineno]  # without the __init__ that a dataclass gets
    init = [signature(m).replace("__init__", found.name) for m in members if m.name == "__init__"]
    first = found.docstring.endlineno if found.docstring else found.lineno + len(found.decorators)
    behind = min((m.lineno for m in members), default=found.endlineno + 1) - 1
    lines = "\n".join(found.parent.source.splitlines()[first:behind])
    fields = code(re.sub(r"\s+@\w+$", "", lines))  # a property begins behind its decorator
    methods = [
        directive("method", signature(m), prose(m), fence="`" * 5)
        if m.is_function
        else directive("property", m.name, prose(m), fence="`" * 5)
        for m in members
        if not m.name.startswith("_")
    ]
    return directive("class", *(init or [found.name]), prose(found), fields, *methods)


def entry(found) -> str:
    found = found.final_target if found.is_alias else found
    make = class_ if found.is_class else function if found.is_function else constant
    return make(found)


def section(module) -> str:
    """Constants only where they have a docstring."""
    public = [m for m in module.members.values() if m.is_public and not m.is_module]
    shown = [m for m in public if m.has_docstring or not m.is_attribute]
    return "\n\n".join([directive("module", module.path), prose(module), *map(entry, shown)])


def write_pages(app, config) -> None:
    """docs/api/ROOM.md; what stands beside the rooms is on the page of the package."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir()
    inside = lambda module: sorted(module.modules.values(), key=lambda m: m.path)
    rooms = [m for m in inside(PACKAGE) if m.is_subpackage and m.name not in NO_REFERENCE]
    beside = [m for m in inside(PACKAGE) if not m.is_subpackage]
    for page, modules in [(PACKAGE, beside), *((room, inside(room)) for room in rooms)]:
        parts = [f"# {page.path}", section(page)]
        parts += [f"## {m.path}\n\n{section(m)}" for m in modules]
        (PAGES / f"{page.name}.md").write_text("\n\n".join(parts) + "\n")


def qualify(app, doctree) -> None:
    """Names in full, as the module that speaks of them knows them, or as seen from `salt_jax`.

    Warns of a name that is not in the module or class it is said to be in.
    """
    objects = PACKAGE.modules_collection
    for node in doctree.findall(pending_xref):
        if node["refdomain"] != "py":
            continue
        name = node["reftarget"]
        try:
            name = objects[node.get("py:module") or PACKAGE.path].resolve(name)
        except griffe.NameResolutionError:
            name = f"salt_jax.{name}" if "." in name and not name.startswith("salt_jax.") else name
        node["reftarget"] = name
        node.attributes.pop("refspecific", None)  # which would be a guess by the last word
        home, _, member = name.rpartition(".")
        with suppress(KeyError):  # not ours, or an attribute of some value
            if home.count(".") > 1 and member not in objects[home].all_members:
                getLogger(__name__).warning("%s is not in %s", member, home, location=node)


def setup(app):
    app.connect("config-inited", write_pages)
    app.connect("doctree-read", qualify)
