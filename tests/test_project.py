"""Promises that the files beside the code make."""

import re
import subprocess
import tomllib

import pytest
import yaml

import salt_jax
from salt_jax.cli import main
from tests.helpers import ROOT


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_have_both_bounds(name):
    for line in requirements(name):
        assert "==" in line or re.search(r">=[\d.]+,<[\d.]+$", line), (
            f"{name}: {line} lacks a bound"
        )


def test_extras_that_are_named_exist():
    """As in `pip install -e ".[gcs]"`, of this package; those of jax are not ours."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        told = tomllib.load(file)
    there = told["project"].get("optional-dependencies", {})
    there |= told["tool"]["setuptools"]["dynamic"].get("optional-dependencies", {})
    texts = [*(ROOT / "docs").glob("*.md"), *(ROOT / "launch").glob("*"), ROOT / "README.md"]
    named = {
        (extra, text.name)
        for text in texts
        if text.is_file()
        for extra in re.findall(r"(?:salt_jax|[\"' ]\.)\[(\w+)\]", text.read_text())
    }
    assert named and {extra for extra, _ in named} <= there.keys(), named


def test_torch_is_no_runtime_requirement():
    assert not any(
        line.startswith(("torch", "diffusers", "transformers"))
        for line in requirements("requirements.txt")
    )


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    for command in ("bash launch/quickstart.sh", "bash launch/test.sh"):
        assert command in readme


def test_every_local_link_in_the_documents_leads_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_document_is_linked_from_the_readme_or_the_guide():
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/guide.md")]
    for document in (ROOT / "docs").glob("*.md"):
        assert any(f"{document.name}" in re.findall(r"\]\((?:docs/)?([^)#]+)", t) for t in texts)


def test_no_file_carries_the_marks_of_a_merge():
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    texts = [ROOT / n for n in names if n.endswith((".md", ".py", ".sh", ".toml", ".txt", ".yml"))]
    assert len(texts) > 200
    for text in texts:
        marks = re.findall(r"^(?:<{7}|>{7}) ", text.read_text(), re.M)
        assert not marks, f"{text}: {marks}"


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_script_refuses_an_old_python(script, tmp_path):
    """Scripts run in a copy without .venv, with an interpreter that says it is too old."""
    (tmp_path / "launch").mkdir()
    for name in {script, "launch/venv.sh"}:
        (tmp_path / name).write_text((ROOT / name).read_text())
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", script],
        cwd=tmp_path,
        env={"PYTHON": str(old), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr and "Python 3.9.1" in done.stderr
    assert not (tmp_path / ".venv").exists()


def flags_of(program: str, seen: set[str]) -> set[str]:
    """Names that a module of salt_jax/cli defines, with what it imports of that room."""
    seen.add(program)
    text = (ROOT / "salt_jax" / "cli" / f"{program}.py").read_text()
    found = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text))
    for line in re.findall(r"^from salt_jax\.cli(?:\.| import )(.+)", text, re.M):
        for name in set(re.split(" as | import ", line)[0].split(", ")) - seen:
            found |= flags_of(name, seen)
    return found


SCRIPT = r"launch/(tpu_pod\.sh|slurm\.sbatch)"
FOREIGN = r"\b(gcloud|kubectl|docker|git|sbatch|srun|squeue|scontrol|scancel) "


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md", "docs/wan.md", "docs/pods.md"])
def test_documented_flags_are_those_of_their_program(document):
    """A flag belongs to the program before it on its line; in a table of flags to that of the
    section; elsewhere to any. Flags of programs that are not ours are not looked at.
    """
    flags = {name: flags_of(name, set()) for name in main.COMMANDS.values()}
    every = set().union(*flags.values())
    flags |= {"tpu_pod.sh": every | {"dry"}, "slurm.sbatch": flags["train"] | {"dry"}}  # --dry-run
    others = {"all", "logdir", "help"}  # of launch/test.sh, of TensorBoard, of all programs
    section, checked = None, 0
    for line in (ROOT / document).read_text().replace("\\\n", " ").splitlines():
        if heading := re.match(r"\*\*launch\.(\w+)\.\*\*|## ", line):
            section = heading[1]
        table = line.startswith("| `--")
        program = section if table else None
        named = r"launch\.(\w+)" + r"(?= --)" * table
        for found in re.findall(f"{named}|{SCRIPT}|{FOREIGN}" + r"|(?<![\w-])--(\w+)", line):
            *names, flag = found
            program = "".join(names) or program
            if flag and not re.fullmatch(FOREIGN, f"{program} ") and not flag.startswith("xla_"):
                assert flag in flags.get(program, every) | others, f"{program}: {line}"
                checked += program in flags
    assert checked > 10


def test_the_version_is_told_alike():
    version = f"{salt_jax.__version__}"
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_files_of_the_repositorys_host_are_read():
    """They run elsewhere, so here only that they are YAML and say what they have to."""
    told = {
        path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")
    }
    (job,) = told["ci.yml"]["jobs"].values()
    assert job["steps"][-1]["run"] == "bash .ci/run" and job["strategy"]["matrix"]["python"] == [
        "3.11",
        "3.12",
    ]
    for name in ("problem.yml", "wish.yml"):
        assert told[name]["name"] and all(
            field["type"] == "textarea" for field in told[name]["body"]
        )
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "format", "types"]
