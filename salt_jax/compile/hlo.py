"""What the text of a compiled program says: what its devices send each other, and which attention
kernels it has.

The text is that of one device. Bytes are those that one device sends where n of them pass their
parts around a ring, the least that a large array takes: gather and scatter (n - 1) / n of the
whole, a sum of all twice that. Each collective is told by the axes of the mesh that it runs along:
those along which the devices of one of its groups differ.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# Of a number; others say it in their name: f32, u8, f8e4m3fn
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
COLLECTIVE = re.compile(
    r"(all-gather|reduce-scatter|all-reduce|(?:ragged-)?all-to-all|"
    r"collective-permute|collective-broadcast)(-start)?$"
)
CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=\{?(%[^ ]+(?:, %[^ ]+)*)")
# cuDNN's, and Pallas kernels for TPU (Mosaic) and GPU (Triton, Mosaic)
KERNEL = re.compile(
    r'custom_call_target="(__cudnn\$fmha\w*|tpu_custom_call|__gpu\$xla\.gpu\.triton|mosaic_gpu\w*)"'
)


class Moved(NamedTuple):
    """One kind of collective."""

    calls: int  # places in the program
    runs: int  # of all of them in one run of the program, loops counted
    bytes: int  # that one device sends in a run
    over: dict[str, int]  # these bytes by axes of the mesh, "data+fsdp"
    open: dict[str, int]  # those of `over` in loops of unknown length, one turn of each


class Read(NamedTuple):
    """What was found in a program's text."""

    collectives: dict[str, Moved]
    kernels: dict[str, int]  # name -> calls in the program
    open_loops: int  # loops whose length the text does not tell: their bodies count once


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


def read(text: str, mesh: Mapping[str, int]) -> Read:
    """Everything above, of `compiled.as_text()`.

    `mesh`: the size of each axis, the last one changing fastest from device to device.
    """
    computations = _computations(text)
    entry = next(reversed(computations))
    times, opened = Counter({entry: 1}), Counter[str]()  # runs; those in loops of unknown length
    found: dict[str, Moved] = {}
    kernels: Counter[str] = Counter()
    open_loops = 0
    # callers stand behind what they call; the entry is the last
    for name in reversed(computations):
        for i in computations[name]:
            length = 1
            if i.opcode == "while":
                parts = (computations[_callees(i, part)[0]] for part in ("condition", "body"))
                length = _known_length(i) or _length(*parts) or 0
                open_loops += not length
            # they name again what their start has called
            if not i.opcode.endswith(("-done", "-update")):
                for callee in _callees(i):
                    times[callee] += times[name] * (length or 1)
                    opened[callee] += opened[name] * length if length else times[name]
            if match := COLLECTIVE.match(i.opcode):
                was = found.setdefault(match[1], Moved(0, 0, 0, {}, {}))
                found[match[1]] = _added(was, i, (times[name], opened[name]), mesh)
            if i.opcode == "custom-call" and (kernel := KERNEL.search(i.rest)):
                kernels[_kernel(i, kernel[1])] += 1
    return Read(dict(sorted(found.items())), dict(sorted(kernels.items())), open_loops)


def _added(was: Moved, i: Instruction, runs: tuple[int, int], mesh: Mapping[str, int]) -> Moved:
    """With one more collective. `runs`: of it, and those of them in open loops."""
    kind = i.opcode.removesuffix("-start")
    members = _members(i.rest, math.prod(mesh.values()))
    size = round(_bytes(_result(i)) * _sent(kind, len(members[0])))
    axes, (times, opened) = _axes(members, mesh), runs
    over = was.over | {axes: was.over.get(axes, 0) + times * size}
    waits = was.open | ({axes: was.open.get(axes, 0) + opened * size} if opened else {})
    return Moved(was.calls + 1, was.runs + times, was.bytes + times * size, over, waits)


def _sent(kind: str, devices: int) -> int | float:
    """Bytes that one of the devices sends in a collective, in bytes of its result."""
    match kind:
        case "collective-permute" | "collective-broadcast":
            return 1
        case "reduce-scatter":
            return devices - 1
        case "all-reduce":
            return 2 * (devices - 1) / devices
    return (devices - 1) / devices


def _computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation that matter here."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and not line.startswith("HloModule"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0]
            current = found[name if name.startswith("%") else f"%{name}"] = []
        elif line.startswith("  ") and " = " in line:
            name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
            end = _type_end(rest)
            opcode, _, operands = rest[end + 1 :].partition("(")
            current.append(Instruction(name, rest[:end], opcode, operands))
    return found


def _type_end(rest: str) -> int:
    """Where the type ends that an instruction begins with: at the first space outside of all
    brackets.
    """
    if not rest.startswith("("):
        return rest.index(" ")
    depth = 0
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no type in {rest[:100]}")


def _callees(i: Instruction, attribute: str = "") -> list[str]:
    called = [names for kind, names in CALLED.findall(i.rest) if attribute in ("", kind)]
    return [name.strip("{},") for names in called for name in names.split(", ")]


def _known_length(i: Instruction) -> int | None:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
    return int(match[1]) if match else None


def _length(condition: list[Instruction], body: list[Instruction]) -> int | None:
    """Of the loop of these, where it goes on while `counter < constant`: it counts from 0, by 1 in
    jax's loops, by 2 where a TPU's compiler passes parts of a product around two at a time.
    """
    read, wholes = {i.name: i for i in condition}, _wholes(condition)
    for i in condition:
        if i.opcode == "compare" and "direction=LT" in i.rest:
            counter, last = _operands(i)
            if last not in wholes:
                return None
            return math.ceil(wholes[last] / _stride(body, read.get(counter)))
    return None


def _stride(body: list[Instruction], counter: Instruction | None) -> int:
    """By how much a turn raises the counter, which the condition takes from the loop's values."""
    index = re.search(r"index=(\d+)", counter.rest) if counter else None
    left, made = _operands(body[-1]), {i.name: i for i in body}
    following = made.get(left[int(index[1])]) if index and int(index[1]) < len(left) else None
    if following is None or following.opcode != "add":
        return 1
    wholes = _wholes(body)
    return next((wholes[name] for name in _operands(following) if name in wholes), 1)


def _operands(i: Instruction) -> list[str]:
    """Their names; some compilers write the type in front of each."""
    return [name.split(" ")[-1] for name in i.rest.split(")")[0].split(", ")]


def _wholes(instructions: list[Instruction]) -> dict[str, int]:
    """Constants that are one whole number."""
    return {
        i.name: int(i.rest.split(")")[0])
        for i in instructions
        if i.opcode == "constant" and re.match(r"\d+\)", i.rest) and re.match(r"[su]32\[\]", i.type)
    }


def _result(i: Instruction) -> str:
    """The type of what a collective leaves.

    Starts have what they read in front of it: (read, left, ...).
    """
    if not i.opcode.endswith("-start") or not i.type.startswith("("):
        return i.type
    parts, depth, start = [], 0, 1
    for at, sign in enumerate(i.type[1:-1], 1):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            parts.append(i.type[start:at])
            start = at + 1
    parts.append(i.type[start:-1])
    # An all-reduce may also be started in place: all of its tuple is left.
    whole = i.opcode == "all-reduce-start" and not parts[0].startswith("(")
    return i.type if whole else parts[1]


def _bytes(shapes: str) -> float:
    total = 0.0
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shapes):
        bits = BITS.get(kind) or next(iter(re.findall(r"^[fsu](\d+)", kind)), 0)
        total += int(bits) / 8 * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _members(attributes: str, everyone: int) -> np.ndarray:
    """Devices [groups, devices of one] that take part together; of a permutation each pair."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*\})\}", attributes):
        groups = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(n) for n in group.split(",")] for group in groups])
    # [groups, of one]<=[shape]T(order)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=([\[\d,\]T()]+)", attributes):
        return _devices(f"({match[3].rstrip(',')})", everyone).reshape(int(match[1]), int(match[2]))
    # mesh['data'=2,'fsdp'=4] {'fsdp'}, or a part of an axis: {'fsdp':(1)2}
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        places = _along(dict(re.findall(r"'([^']+)'=(\d+)", match[1])), match[3])
        return _devices(match[2], everyone)[places]
    return np.arange(everyone)[None]


def _devices(order: str, everyone: int) -> np.ndarray:
    """The devices of a mesh in its order: as they are, or `device_ids=([2,4]T(1,0))`, or a list."""
    if match := re.search(r"\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        grid = np.arange(everyone).reshape([int(n) for n in match[1].split(",")])
        return grid.transpose([int(n) for n in match[2].split(",")] if match[2] else None).ravel()
    listed = [int(n) for n in re.findall(r"\d+", order)]
    return np.array(listed) if listed else np.arange(everyone)


def _along(sizes: Mapping[str, str], axes: str) -> np.ndarray:
    """Groups along axes of a mesh, or parts of them, of places in it."""
    taken = {
        axis: (int(before or 1), int(part or sizes[axis]))
        for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape, along = [], []
    for axis, size in sizes.items():
        before, part = taken.get(axis, (1, 1))
        shape += [before, part, int(size) // before // part]
        along.append(len(shape) - 2)
    grid = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), along, range(-len(along), 0))
    return grid.reshape(-1, math.prod(part for _, part in taken.values()))


def _axes(members: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The axes of the mesh along which devices of a group differ, joined by "+"; "" where none."""
    places = np.unravel_index(members, tuple(mesh.values()))
    differ = ((place != place[:, :1]).any() for place in places)
    return "+".join(axis for axis, moves in zip(mesh, differ, strict=True) if moves)


def _kernel(i: Instruction, target: str) -> str:
    """A name for people: Pallas kernels have theirs in the name of the instruction."""
    name = re.sub(r"[.\d]+$", "", i.name.lstrip("%"))
    return target if target.startswith("__cudnn") else f"{name} ({target})"
