"""Which files in a folder are the networks and the tokenizer of Wan 2.1, whatever they are
called.
"""

import re
from collections import defaultdict
from collections.abc import Callable

from salt_jax.convert.files import open_tensors
from salt_jax.convert.foreign import foreign_by_names
from salt_jax.convert.reading import Found, networks_in
from salt_jax.convert.sizes import PARTS
from salt_jax.errors import UserError, listed
from salt_jax.io.files import AnyPath, below
from salt_jax.io.model_folder import TOKENIZERS

SHARD = r"-\d+-of-(\d+)(?=\.\w+$)"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# What trainings leave beside weights.
NO_NETWORK = (
    r"(training_args|optimizer|scheduler|scaler|random_states.*|rng_state.*)\.(bin|pt|pth)|.*\.gguf"
)


def find_networks(
    src: AnyPath, unused: Callable[[AnyPath], object], key: str = ""
) -> dict[str, Found]:
    """The networks in a folder with everything below it, or in a file, by what they are.

    Args:
      unused: is called with each file that has no network of Wan 2.1.
      key: which network of a file that holds several of one kind; "": the averaged student.

    Raises:
      UserError: there is none, one twice, or one that is not complete.
    """
    networks: dict[str, Found] = {}
    seen = []
    for files in weight_files(src):
        if files[0] != src and re.fullmatch(NO_NETWORK, files[0].name):
            unused(files[0])
            continue
        opened = open_tensors(files)
        found = networks_in(opened, files, key)
        seen += [] if found else opened.tensors
        if not found:
            unused(files[0])
        for one in found:
            if one.network in networks:
                both = f"{networks[one.network].files[0]} and {one.files[0]}"
                raise UserError(
                    f"{both} are both a {one.network}; name the folder or file of one of them"
                )
            networks[one.network] = one
    if not networks:
        reason = foreign_by_names(seen) or (
            f"its names are {listed(seen)}" if seen else "there are no weights in it"
        )
        raise UserError(
            f"{src} holds none of {', '.join(PARTS)} of Wan 2.1: {reason}; name another folder or "
            "file"
        )
    students = {one.student for one in networks.values()} - {""}
    if key and not any(key in (student, *re.split(r"[./]", student)) for student in students):
        raise UserError(
            f"{src} has no network under --key={key}; there is {listed(students) or 'one alone'}"
        )
    return networks


def weight_files(src: AnyPath) -> list[list[AnyPath]]:
    """The files with weights in a folder, shards of one model together; hidden ones are left out.

    Raises:
      UserError: there is nothing, or shards are absent.
    """
    if not src.exists():
        raise UserError(f"there is no {src}; check the name")
    models = defaultdict(list)
    if src.is_dir():
        for path in below(src):
            hidden = any(part.startswith(".") for part in path.relative_to(src).parts)
            if path.suffix in (*SUFFIXES, ".gguf") and not hidden:
                models[_model(path)].append(path)
    else:
        models[_model(src)] = sorted(
            path for path in src.parent.iterdir() if _model(path) == _model(src)
        )
    for model, files in models.items():
        count = re.search(SHARD, files[0].name)
        if count and len(files) != int(count[1]):
            raise UserError(
                f"{model.parent} has {len(files)} files {model.name}; download the rest"
            )
    return list(models.values())


def tokenizer_files(src: AnyPath) -> list[AnyPath]:
    """umT5's, of the release or the Diffusers layout; the release of image-to-video models has
    another one too.
    """
    files = [p for p in below(src) if p.parent.name in ("umt5-xxl", "tokenizer")]
    for folder in dict.fromkeys(path.parent for path in files):
        if some := [folder / name for name in TOKENIZERS if folder / name in files]:
            return some
    return []


def _model(path: AnyPath) -> AnyPath:
    """One name for all shards of a model."""
    return path.parent / re.sub(SHARD, r"-of-\1", path.name)
