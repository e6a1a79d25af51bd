"""What all programs do with their command line.

No jax in here: what is wrong with it is said at once.
"""

import importlib.metadata
import importlib.util
import logging as std_logging
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from salt_jax.config.paths import make_absolute
from salt_jax.config.reading import read_recipe, read_workdir, to_json
from salt_jax.errors import STOPPED, Stopped, UserError
from salt_jax.io.cache import cache_home
from salt_jax.io.files import as_path, refusal
from salt_jax.keys import Config, Json

PACKAGES = ("salt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
flags.DEFINE_bool("print_config", False, "print the resolved config as JSON, and do nothing else")


def read_config(flag: flags.FlagHolder | flags.Flag) -> Config:
    """The ConfigDict of a flag that ml_collections defined, its paths made absolute.

    Raises UserError if there is no such file.
    """
    this = flags.FLAGS[flag.name]
    name = config_flags.get_config_filename(this)
    try:
        config: Config = flag.value
        config.keys()
    except OSError as error:
        raise UserError(f"cannot load the config file {name}; check --{flag.name}") from error
    make_absolute(config, Path(name), config_flags.get_override_values(this))
    return config


def config_made_by(flag: flags.FlagHolder) -> Json:
    """The origin of a config for its config.json: file, variants, command-line changes, commit and
    versions.
    """
    this = flags.FLAGS[flag.name]
    name, _, options = str(config_flags.get_config_filename(this)).partition(":")
    return {
        "config": name,
        "options": options,
        "changed": {k: str(v) for k, v in config_flags.get_override_values(this).items()},
        "commit": commit(),
        "versions": versions(PACKAGES),
    }


def made_with(module: str, packages: Collection[str]) -> Json:
    """The origin of a file of measurements: command, commit, host, and versions of the packages
    that are installed.
    """
    return {
        "command": ["python", "-m", module, *sys.argv[1:]],
        "commit": commit(),
        "host": f"{platform.machine()} {platform.system()}",
        "versions": versions(packages),
    }


def commit() -> str | None:
    """Git commit of the checkout that this package is in; None: it is installed, or git is not."""
    here = Path(__file__).parent
    if not shutil.which("git"):
        return None

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True)

    if git("ls-files", "--error-unmatch", __file__).returncode:
        return None
    # Figures are written to docs/, so that may have changed.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/docs").stdout
    return git("describe", "--always").stdout.strip() + "-dirty" * bool(changed.strip())


def versions(packages: Collection[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    there = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {p: there[p] for p in packages if p in there}


def refuse_flags(
    mode: str, modes: Mapping[str, str], belongs: Mapping[str, Collection[str]]
) -> None:
    """Refuses flags that do not apply in this mode.

    Args:
      mode: the one that the other flags choose; a key of `modes`, which say in words what each is.
      belongs: flag -> the modes it is for.

    Raises:
      UserError: the first such flag, by name.
    """
    for name, where in belongs.items():
        if flags.FLAGS[name].present and mode not in where:
            fits = " or ".join(modes[m] for m in modes if m in where)
            raise UserError(f"--{name} is for {fits}, and this is {modes[mode]}; leave it out")


def name_files(*found: flags.FlagHolder) -> None:
    """Declares that flags name files or folders: an address that is not read is refused with the
    command line.
    """

    def readable(name: str, value: object) -> bool:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str):
                as_path(each, f"--{name}")
        return True

    for flag in found:
        flags.register_validator(flag.name, partial(readable, flag.name))


def refuse_pairs(
    needs: Mapping[str, Collection[str]], excludes: Mapping[str, Collection[str]]
) -> None:
    """Refuses flags without one of those they belong to, and flags that exclude each other.

    Raises:
      UserError: the first such flag, by name.
    """
    there = {name for name in flags.FLAGS if flags.FLAGS[name].present}
    for name, others in needs.items():
        if name in there and not there & set(others):
            needed = " or ".join(f"--{other}" for other in others)
            raise UserError(
                f"--{name} has no meaning without {needed}; give that too, or leave it out"
            )
    for name, others in excludes.items():
        for other in others:
            if {name, other} <= there:
                raise UserError(f"--{name} and --{other} exclude each other; give one of them")


def run_main(
    main: Callable[[list[str]], None],
    doc: str | None = None,
    tell_others: Callable[[list[str], UserError], None] = lambda argv, error: None,
) -> None:
    """absl's app.run, with every error that is the user's to mend printed as one line and exit code
    2.

    Args:
      doc: what --help says before the flags.
      tell_others: called when flags cannot be read, after the sentence is printed: other processes
        of the run may wait for this one.
    """

    def parse(argv):
        if {"-h", "--help"} & set(argv):
            print(help_text(doc or sys.modules["__main__"].__doc__ or ""))
            sys.exit(0)
        argv = [find_config(argument) for argument in argv]
        try:
            return read_flags(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            tell_others(argv, error)
            sys.exit(2)

    def guarded(argv):
        # Programs that were compiled once are kept, so the next start and the next run of the same
        # shape are quick.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_home() / "jax"))
        # Of those that take a second a start has one or two, of shorter ones a dozen.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
        # TFDS talks through absl; our own warnings go through the standard logger of their module.
        logging.set_verbosity(logging.ERROR)
        std_logging.getLogger("salt_jax").setLevel(std_logging.WARNING)
        # It tells, with a traceback, of errors of Orbax's tasks that Orbax has raised already.
        std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
        try:
            as_path(os.environ["JAX_COMPILATION_CACHE_DIR"], "JAX_COMPILATION_CACHE_DIR")
            if flags.FLAGS["print_config"].value:
                print(resolved_config())
            else:
                main(argv)
        except UserError as error:
            fail(str(error))
        except Stopped as stopped:
            print(f"{stopped}; the same command goes on", file=sys.stderr)
            sys.exit(STOPPED)
        except Exception as error:
            if not (told := refusal(error)):
                raise
            fail(told)

    app.run(guarded, flags_parser=parse)


def read_flags(argv: list[str]) -> list[str]:
    """Reads the flags of a command line, and returns what is none: the program's name.

    Raises:
      UserError: a flag or a key of a config is unknown, or its value is not what it must be.
    """
    try:
        rest = flags.FLAGS(argv)
    # from ml_collections, which names the key alone
    except (AttributeError, KeyError) as error:
        key, hint = re.search(r"\w+", str(error)), re.search(r"Did you mean.*\?", str(error))
        remedy = hint[0] if hint else "configs/base.py lists every key."
        raise UserError(
            f"unknown config key {key and key[0]!r} in {' '.join(argv[1:])}. {remedy}"
        ) from error
    except OSError as error:  # a config file that is not there, with keys of it changed
        raise UserError(
            f"cannot load the config: {str(error).splitlines()[-1].strip()}; check --config"
        ) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"{error}; see --help and configs/base.py") from error
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; options start with --")
    return rest


def help_text(doc: str) -> str:
    """What a program does, and its flags as they are grouped in its files."""
    lines = [doc.strip()]
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith(("salt_jax.", "launch.")) or module == "__main__":
            lines.append("")
            for flag in found:
                default = "" if flag.default in (None, [], "") else f" (default: {flag.default})"
                lines.append(
                    textwrap.fill(
                        f"--{flag.name}: {flag.help}{default}",
                        100,
                        initial_indent="  ",
                        subsequent_indent="      ",
                    )
                )
    return "\n".join(lines)


def find_config(argument: str) -> str:
    """--config=NAME[:OPTIONS] where there is no such file: that of the configs that come with the
    package, "sc_dmd", "sc_dmd.py" or "configs/sc_dmd.py". Anything else as it is.
    """
    flag, equals, value = argument.partition("=")
    name, colon, options = value.partition(":")
    spec = importlib.util.find_spec("configs")
    if flag != "--config" or not equals or Path(name).is_file() or not spec or not spec.origin:
        return argument
    stem = name.removeprefix("configs/").removesuffix(".py")
    file = Path(spec.origin).with_name(f"{stem}.py")
    return f"--config={file}{colon}{options}" if stem and file.is_file() else argument


def resolved_config() -> str:
    """The config that the flags come to, or that of the workdir they name, as JSON.

    Raises UserError where there is neither.
    """
    there = flags.FLAGS
    if "config" in there and there["config"].value is not None:
        return to_json(read_recipe(read_config(there["config"])))
    if "workdir" in there and there["workdir"].value:
        return to_json(read_workdir(there["workdir"].value))
    raise UserError("--print_config needs a --config or a --workdir")


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
