"""A batch is a function of (seed, step): no matter where reading starts or how many processes share
it.
"""

import itertools
from collections import Counter

import chex
import numpy as np
import pytest

from salt_jax.data import pipeline
from salt_jax.moving_shapes import dataset
from salt_jax.moving_shapes.latents import to_pixels
from salt_jax.moving_shapes.shapes import World

WORLD = World()
NUM = 22  # not a multiple of the batch: epochs end inside batches
BATCH = 8


@pytest.fixture(scope="module")
def source():
    return [dataset.example(WORLD, 0, i) for i in range(NUM)]


def encode(caption: str) -> np.ndarray:
    return np.frombuffer(caption.encode().ljust(40), np.uint8).astype(np.int32)


def read(source, count, **changes):
    settings = {
        "batch_size": BATCH,
        "seed": 5,
        "start": 0,
        "encode_caption": encode,
        "world": WORLD,
    }
    settings |= {"rows": np.arange(BATCH)}
    return list(itertools.islice(pipeline.batches(source, **(settings | changes)), count))


def test_batch_has_the_promised_form(source):
    (batch,) = read(source, 1)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "video": ((BATCH, 9, 12, 12, 3), np.float32),
        "text": ((BATCH, 40), np.int32),
        "scene": ((BATCH,), np.int32),
    }
    assert batch["video"].min() == -1 and batch["video"].max() <= 1
    clips = {record["video"].tobytes(): record for record in source}
    for video, text, scene in zip(batch["video"], batch["text"], batch["scene"], strict=True):
        record = clips[to_pixels(video, WORLD).tobytes()]  # the three still belong together
        assert record["scene"] == scene
        np.testing.assert_array_equal(text, encode(record["caption"]))


@pytest.mark.parametrize("start", [1, 7])
@pytest.mark.parametrize("rows", [range(BATCH), range(1, BATCH, 2)])
def test_reading_from_start_is_the_rest_of_the_stream(source, start, rows):
    share = {"rows": np.array(rows)}
    chex.assert_trees_all_equal(
        read(source, 4, start=start, **share), read(source, start + 4, **share)[start:]
    )


@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_processes_are_the_batch_of_one(source, count):
    whole = read(source, 5)
    shares = [read(source, 5, rows=rows) for rows in np.split(np.arange(BATCH), count)]
    joined = [
        {name: np.concatenate([s[name] for s in step]) for name in step[0]}
        for step in zip(*shares, strict=True)
    ]
    assert shares[0][0]["video"].shape[0] == BATCH // count
    chex.assert_trees_all_equal(joined, whole)


def test_every_epoch_has_every_example_once_in_another_order():
    source = [
        {"video": np.zeros((1, 1, 1, 3), np.uint8), "caption": "", "scene": i} for i in range(NUM)
    ]
    stream = np.concatenate([b["scene"] for b in read(source, 11)])  # 88 = 4 epochs
    epochs = stream.reshape(4, NUM)
    assert all(Counter(epoch.tolist()) == Counter(range(NUM)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(
        stream, np.concatenate([b["scene"] for b in read(source, 11, seed=6)])
    )


def test_each_caption_is_encoded_once(source):
    calls = Counter()

    def counted(caption: str) -> np.ndarray:
        calls[caption] += 1
        return encode(caption)

    read(source, 9, encode_caption=counted)
    assert calls == Counter({record["caption"] for record in source})


def test_reads_from_disk_what_it_reads_from_memory(source, tmp_path):
    train, _ = dataset.build(tmp_path, WORLD, NUM, 1, 0)
    chex.assert_trees_all_equal(read(train, 4), read(source, 4))


def test_latents_stay_as_they_are_and_states_come_with_their_clip():
    """Records that are encoded already, with trajectories: float32 in, the same bits out."""
    rng = np.random.default_rng(0)
    record = lambda i: {
        "video": rng.normal(size=(3, 4, 4, 16)).astype(np.float32),
        "states": rng.normal(size=(5, 3, 4, 4, 16)).astype(np.float32),
        "caption": "",
        "scene": i,
    }
    records = [record(i) for i in range(NUM)]
    for batch in read(records, 3):
        assert batch["states"].shape == (BATCH, 5, 3, 4, 4, 16)
        for name in ("video", "states"):
            wanted = np.stack([records[i][name] for i in batch["scene"]])
            np.testing.assert_array_equal(batch[name], wanted)


@pytest.mark.parametrize("names", [(), ("video",), ("video", "image", "condition")], ids=len)
def test_encoded_records_bring_their_text_and_only_what_they_have(names):
    """As `latents.open_records` gives them: prompts alone, clips, and image-to-video."""
    rng = np.random.default_rng(0)
    shapes = {"video": (3, 4, 4, 16), "image": (5, 8), "condition": (3, 4, 4, 16), "text": (6, 8)}
    draw = lambda name: rng.normal(size=shapes[name]).astype(np.float32)
    records = [
        {"caption": "x"} | {name: draw(name) for name in (*names, "text")} for _ in range(NUM)
    ]
    number = {record["text"].tobytes(): record for record in records}

    def fails(caption: str) -> np.ndarray:
        raise AssertionError("the text is encoded already")

    for batch in read(records, 3, encode_caption=fails):
        assert batch.keys() == {*names, "text"}
        for i, text in enumerate(batch["text"]):
            for name in names:  # they still belong together, bit for bit
                np.testing.assert_array_equal(batch[name][i], number[text.tobytes()][name])


def test_failure_to_encode_reaches_the_caller(source):
    def fails(caption: str) -> np.ndarray:
        raise ValueError("caption too long")

    with pytest.raises(ValueError, match="caption too long"):
        read(source, 1, encode_caption=fails)


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="empty"):
        read([], 1)
