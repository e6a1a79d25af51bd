"""What is written comes back bit for bit, whoever wrote it and however often the work was
stopped.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from salt_jax.data import pipeline
from salt_jax.data.latents import FORMAT, open_records
from salt_jax.data.writing_latents import Plan, begin, complete, in_groups, write_parts
from salt_jax.errors import UserError
from salt_jax.moving_shapes.shapes import World

CLIP, DIM = (3, 4, 6, 16), 8
SHAPES = {"latent": CLIP, "text": (None, DIM), "image": (5, 10), "condition": CLIP}
NAMES = [f"clip {i}" for i in range(11)]
SETTINGS = {"size": "48x32", "weights": "abc"}
NULL = np.linspace(-1, 1, 2 * DIM).reshape(2, DIM).astype(np.float32)


def example(i: int, shapes=SHAPES) -> dict:
    rng = np.random.default_rng(i)
    sized = {name: (1 + i % 4, DIM) if name == "text" else shape for name, shape in shapes.items()}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in sized.items()}
    return {"caption": f"Clip {i} zeigt Öl.", **arrays}


def make(numbers):
    for i in numbers:
        yield "too short" if i in (4, 5, 6, 7, 9) else example(i)


def write(directory, make=make, process_index=0, process_count=1, **changes):
    plan = Plan(SETTINGS, SHAPES, NULL, NAMES, 4)._replace(**changes)
    begin(directory, plan)
    write_parts(directory, plan, make, process_index, process_count)
    return complete(directory, plan)


KEPT = [0, 1, 2, 3, 8, 10]  # part 1, of 4 to 7, has no record at all


def half(x):
    return x.astype(np.float16).astype(np.float32)


def assert_holds(directory, kept=KEPT, shapes=SHAPES):
    encoded = open_records(directory, CLIP, 6)
    assert len(encoded.records) == len(kept)
    for record, i in zip(encoded.records, kept, strict=True):
        wanted = example(i, shapes)
        assert record["caption"] == wanted["caption"]
        rows = len(wanted["text"])
        assert record["text"].shape == (6, DIM) and not record["text"][rows:].any()
        np.testing.assert_array_equal(record["text"][:rows], half(wanted["text"]))
        for stored, name in (("latent", "video"), ("image", "image"), ("condition", "condition")):
            assert (name in record) == (stored in shapes)
            if name in record:
                assert record[name].dtype == np.float32
                np.testing.assert_array_equal(record[name], half(wanted[stored]))
    return encoded


def test_records_survive_the_disk(tmp_path):
    report = write(tmp_path)
    assert report == (6, [(NAMES[i], "too short") for i in (4, 5, 6, 7, 9)], 0)
    encoded = assert_holds(tmp_path)
    np.testing.assert_array_equal(encoded.null_text, np.pad(half(NULL), ((0, 4), (0, 0))))
    assert encoded.settings["clip"] == list(CLIP) and encoded.settings["weights"] == "abc"
    lines = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[:1]] == [{"source": "clip 4", "reason": "too short"}]
    assert len(lines) == 5


def test_it_is_a_tfds_data_set(tmp_path):
    """Opened as any other, without our code and without TensorFlow; also after it was moved."""
    write(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    builder = tfds.builder_from_directory(str(tmp_path / "b"))
    source = builder.as_data_source("train")
    assert len(source) == 6 and source[4]["latent"].dtype == np.float16
    np.testing.assert_array_equal(source[4]["latent"], example(8)["latent"].astype(np.float16))
    assert builder.info.splits["train"].num_examples == 6
    assert "tensorflow" not in sys.modules


def test_switch_prompts_come_with_their_prompts_whoever_reads_them(tmp_path):
    """Two processes, each its rows of a batch: together the batch of one."""
    shapes = {"text": (None, DIM), "switch": (None, DIM)}

    def pair(i):
        rng = np.random.default_rng(i)
        rows = {name: rng.normal(size=(1 + (i + k) % 4, DIM)) for k, name in enumerate(shapes)}
        return {"caption": f"{i}"} | {name: x.astype(np.float32) for name, x in rows.items()}

    write(tmp_path, lambda numbers: map(pair, numbers), shapes=shapes)
    records = open_records(tmp_path, CLIP, 6).records
    padded = lambda x: np.pad(half(x), ((0, 6 - len(x)), (0, 0)))
    of = {padded(pair(i)["text"]).tobytes(): padded(pair(i)["switch"]) for i in range(len(NAMES))}

    def batch(rows):
        settings = {"batch_size": 4, "seed": 0, "start": 0, "world": World()}
        stream = pipeline.batches(records, encode_caption=str.split, rows=rows, **settings)
        return next(stream)

    whole = batch(np.arange(4))
    assert whole.keys() == {"text", "switch"} and whole["switch"].shape == (4, 6, DIM)
    for text, switch in zip(whole["text"], whole["switch"], strict=True):
        np.testing.assert_array_equal(switch, of[text.tobytes()])
    shares = [batch(rows) for rows in (np.arange(2), np.arange(2, 4))]
    for name, wanted in whole.items():
        np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), wanted)


@pytest.mark.parametrize(
    "shapes", [{"text": (None, DIM)}, {"latent": CLIP, "text": (None, DIM)}], ids=len
)
def test_prompts_alone_and_clips_without_pictures(tmp_path, shapes):
    write(tmp_path, lambda numbers: (example(i, shapes) for i in numbers), shapes=shapes)
    encoded = assert_holds(tmp_path, range(11), shapes)
    stream = pipeline.batches(
        encoded.records,
        batch_size=4,
        seed=0,
        start=0,
        encode_caption=str.split,  # not called
        rows=np.arange(2),
        world=World(),
    )
    assert next(stream).keys() == {"text"} | ({"video"} if "latent" in shapes else set())


def test_stopped_work_goes_on_with_the_next_part(tmp_path):
    def stops(numbers):
        for i, record in zip(numbers, make(numbers), strict=True):
            if i == 9:
                raise KeyboardInterrupt
            yield record

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stops)
    with pytest.raises(UserError, match=r"is not complete; run launch.encode again"):
        open_records(tmp_path, CLIP, 6)
    asked = []

    def counted(numbers):
        asked.extend(numbers)
        return make(numbers)

    assert write(tmp_path, counted).written == 6
    assert asked == [8, 9, 10]
    assert_holds(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert not any("partial" in f.name for f in before)
    assert write(tmp_path, asked.remove).written == 6  # a second start makes nothing
    assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}


def test_what_a_kill_leaves_behind_is_made_again(tmp_path):
    """Half a file under its temporary name, or a whole one without the note that makes it count."""
    write(tmp_path)
    whole = {f: f.read_bytes() for f in tmp_path.glob("encoded-train*")}
    for part, suffix in ((0, ".partial"), (2, "")):
        (tmp_path / "parts" / f"{part:05d}.json").unlink()
        file = tmp_path / f"encoded-train.array_record-{part:05d}-of-00003"
        file.rename(f"{file}{suffix}")
        Path(f"{file}{suffix}").write_bytes(whole[file][:100])
    (tmp_path / "dataset_info.json").unlink()
    assert write(tmp_path).written == 6
    assert_holds(tmp_path)
    assert whole == {f: f.read_bytes() for f in tmp_path.glob("encoded-train*")}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_processes_share_the_parts(tmp_path, order):
    reports = [write(tmp_path, process_index=i, process_count=2) for i in order]
    assert reports[0].missing == (1 if order[0] == 0 else 2)
    assert reports[1].missing == 0 and reports[1].written == 6
    assert_holds(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": SETTINGS | {"size": "64x64"}}, "begun with size=48x32, this run has 64x64"),
        ({"settings": {"size": "48x32"}}, "begun with weights=abc, this run has None"),
        ({"names": NAMES[:9]}, "begun with sources=11, this run has 9"),
        ({"per_part": 5}, "begun with per_part=4, this run has 5"),
        (
            {"shapes": SHAPES | {"latent": (5, 4, 6, 16)}},
            r"begun with clip=\[3, 4, 6, 16\], this run has \[5",
        ),
        ({"shapes": {k: v for k, v in SHAPES.items() if k != "image"}}, "begun with shapes="),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        write(tmp_path, **change)
    assert_holds(tmp_path)


@pytest.mark.parametrize(
    "value, shown", [(7e4, "70000"), (-1e6, "1e+06"), (np.nan, "nan"), (np.inf, "inf")]
)
@pytest.mark.parametrize("name", ["latent", "text"])
def test_values_beyond_float16_are_rejected(tmp_path, name, value, shown):
    def large(numbers):
        for i in numbers:
            record = example(i)
            record[name].flat[3] = value if i == 2 else 65504
            yield record

    report = write(tmp_path, large)
    assert report.written == 10
    ((source, reason),) = report.rejected
    assert source == "clip 2" and reason.startswith(f"its {name} has values up to {shown}")
    assert open_records(tmp_path, CLIP, 6).records[2]["text"].max() <= 65504


def test_nothing_encoded_is_an_error(tmp_path):
    with pytest.raises(
        UserError,
        match=r"none of 11 sources could be encoded \(clip 0: dark\); see .*rejected.jsonl",
    ):
        write(tmp_path, lambda numbers: ["dark" for _ in numbers])
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 11


def test_a_record_of_another_size_is_a_mistake_of_the_program(tmp_path):
    odd = lambda numbers: (
        example(i) | {"latent": np.zeros((1, 4, 6, 16), np.float32)} for i in numbers
    )
    with pytest.raises(ValueError, match="latent"):
        write(tmp_path, odd)


def test_data_that_do_not_fit_are_refused_on_reading(tmp_path):
    with pytest.raises(UserError, match=r"holds no encoded data; write it with launch.encode"):
        open_records(tmp_path, CLIP, 6)
    write(tmp_path)
    with pytest.raises(
        UserError, match=r"are \[3, 4, 6, 16\] .* the run wants \[21, 60, 104, 16\]"
    ):
        open_records(tmp_path, (21, 60, 104, 16), 6)
    records = open_records(tmp_path, CLIP, 3).records
    with pytest.raises(ValueError, match="a text has 4 tokens, the model reads 3"):
        records[3]
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match="has format 2, this version of salt_jax reads 1"):
        open_records(tmp_path, CLIP, 6)


def test_groups_keep_the_order_and_one_size():
    """Reasons stay in their places, what is encoded comes in full groups, whatever is in them."""
    sizes = []

    def encode(group):
        sizes.append(len(group))
        return [{"caption": str(item)} for item in group]

    load = lambda i: "bad" if i in (0, 4, 5, 6, 7, 13) else i
    for size in (1, 3, 4, 30):
        sizes.clear()
        told = list(in_groups(range(3, 15), load, encode, size))
        assert told == [load(i) if load(i) == "bad" else {"caption": str(i)} for i in range(3, 15)]
        assert set(sizes) == {size}


def test_what_fails_while_loading_or_encoding_is_not_hidden():
    def fails(item):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(in_groups(range(3), fails, list, 2))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(in_groups(range(3), int, fails, 2))


def test_what_another_reader_began_is_not_continued(tmp_path):
    """Records of before would have other frames and colours than those that follow."""
    write(tmp_path, settings=SETTINGS | {"reader": 1})
    with pytest.raises(
        UserError, match=r"begun with reader=1, this run has 2; .*choose another --dst"
    ):
        write(tmp_path, settings=SETTINGS | {"reader": 2})


def test_a_place_that_is_no_directory_and_damaged_settings_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot make the directory .*file .File exists.; choose another"
    ):
        write(tmp_path / "file")
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json is damaged"):
        write(tmp_path)
