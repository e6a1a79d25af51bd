"""Files of torch.save by hand, opcode by opcode: without torch, and what torch never writes."""

import struct
import zipfile

text = lambda s: b"X" + struct.pack("<I", len(s.encode())) + s.encode()
number = lambda n: b"\x8a\x09" + n.to_bytes(9, "little", signed=True)
name = lambda module, attribute: f"c{module}\n{attribute}\n".encode()
group = lambda *items: b"(" + b"".join(items) + b"t"
call = lambda function, *args: function + group(*args) + b"R"
table = lambda pairs: b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"
whole = lambda body: b"\x80\x02" + body + b"."
ordered = lambda pairs: call(name("collections", "OrderedDict")) + table(pairs)[1:]
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def storage(kind, key, count):
    return (
        group(
            text("storage"), name("torch", f"{kind}Storage"), text(key), text("cpu"), number(count)
        )
        + b"Q"
    )


def tensor(where, offset, shape, strides):
    lengths = lambda numbers: group(*map(number, numbers))
    hooks = call(name("collections", "OrderedDict"))
    return call(REBUILD, where, number(offset), lengths(shape), lengths(strides), b"\x89", hooks)


def fp8(dtype=None, kind=None, count=3):
    """As torch writes three numbers of 8 bits: untyped bytes, and what they are."""
    dtype = dtype or name("torch", "float8_e4m3fn")
    typed = name("torch", f"{kind}Storage") if kind else name("torch.storage", "UntypedStorage")
    where = group(text("storage"), typed, text("0"), text("cpu"), number(count)) + b"Q"
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v3")
    return call(
        rebuild, where, number(0), group(number(3)), group(number(1)), b"\x89", hooks, dtype
    )


def archive(path, body, storages, root="model", kind=zipfile.ZIP_STORED, **extra):
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr(f"{root}/data.pkl", whole(body))
        for key, data in storages.items():
            file.writestr(f"{root}/data/{key}", data)
        for key, data in extra.items():
            file.writestr(f"{root}/{key}", data)
    return path


class Shell:
    """What pickle.loads would run."""

    def __init__(self, function, *args):
        self.told = function, args

    def __reduce__(self):
        return self.told
