"""Totals against rows of VBench's leaderboard, names and seeds against VBench's protocol."""

import json

import pytest

from salt_jax.errors import UserError
from salt_jax.evaluate.vbench import (
    DIMENSIONS,
    Prompt,
    jobs,
    read_prompts,
    read_results,
    total,
    totals,
)

# In the order of the published tables, percent: (total, quality, semantic), then the 16 dimensions.
# As printed by Goku (arXiv 2502.04896) and Show-o2 (arXiv 2506.15564) from the leaderboard.
PUBLISHED = {
    "VideoCrafter-2.0": (
        "80.44 82.20 73.42 "
        "96.85 98.22 98.41 97.73 42.50 63.13 67.22 92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 "
        "28.23"
    ),
    "Kling": (
        "81.85 83.39 75.68 "
        "98.33 97.60 99.30 99.40 46.94 61.21 65.62 87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 "
        "26.42"
    ),
    "CausVid": (
        "84.27 85.65 78.75 "
        "97.53 97.19 96.24 98.05 92.69 64.15 68.88 92.99 72.15 99.80 80.17 64.65 56.58 24.27 25.33 "
        "27.51"
    ),
    "Luma": (
        "83.61 83.47 84.17 "
        "97.33 97.43 98.64 99.35 44.26 65.51 66.55 94.95 82.63 96.40 92.33 83.67 58.98 24.66 26.29 "
        "28.13"
    ),
    "Mira": (
        "71.87 78.78 44.21 "
        "96.23 96.92 98.29 97.54 60.33 42.51 60.16 52.06 12.52 63.80 42.24 27.83 16.34 21.89 18.77 "
        "18.72"
    ),
}
COLUMNS = (
    "subject_consistency background_consistency temporal_flickering motion_smoothness "
    "dynamic_degree "
    "aesthetic_quality imaging_quality object_class multiple_objects human_action color "
    "spatial_relationship scene "
    "appearance_style temporal_style overall_consistency"
).split()


def published(model):
    """(total, quality, semantic) in percent and scores as fractions."""
    row = [float(number) for number in PUBLISHED[model].split()]
    return row[:3], {name: value / 100 for name, value in zip(COLUMNS, row[3:], strict=True)}


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("model", PUBLISHED)
def test_totals_are_those_of_the_leaderboard(model):
    expected, scores = published(model)
    got = totals(scores)
    assert [got[name] for name in ("total", "quality", "semantic")] == pytest.approx(
        expected, abs=0.011
    )


def test_the_total_weighs_four_to_one():
    # Salt's table says 85.08, of unrounded parts
    assert total(85.96, 81.59) == pytest.approx(85.086)


def test_the_best_and_the_worst_of_every_dimension():
    """By hand: at the upper ends of their ranges all are 100; dynamic degree has half a weight of
    6.5.
    """
    best = dict.fromkeys(DIMENSIONS, 1.0) | {"motion_smoothness": 0.9975, "scene": 0.8222}
    best |= {"appearance_style": 0.2855, "temporal_style": 0.364, "overall_consistency": 0.364}
    assert totals(best) == pytest.approx({"quality": 100, "semantic": 100, "total": 100})
    still = totals(best | {"dynamic_degree": 0.0})
    assert still == pytest.approx(
        {"quality": 600 / 6.5, "semantic": 100, "total": (4 * 600 / 6.5 + 100) / 5}
    )
    assert totals(best | {"color": 0.0})["semantic"] == pytest.approx(800 / 9)
    assert totals(best | {"aesthetic_quality": 0.0})["quality"] == pytest.approx(550 / 6.5)


def test_missing_dimensions_are_named():
    scores = published("CausVid")[1]
    del scores["color"], scores["dynamic_degree"]
    with pytest.raises(ValueError, match="missing: dynamic_degree, color"):
        totals(scores)


def test_results_of_vbench_are_read_however_they_are_spread(tmp_path):
    scores = published("CausVid")[1]
    nested = {
        name: [score, [{"video_path": "a.mp4", "video_results": score}]]
        for name, score in scores.items()
    }
    assert read_results(written(tmp_path / "flat.json", scores)) == scores
    assert read_results(written(tmp_path / "nested.json", nested)) == scores
    blanks = {name.replace("_", " "): score for name, score in scores.items()}
    assert read_results(written(tmp_path / "blanks.json", blanks)) == scores
    for name, value in nested.items():
        written(tmp_path / f"results_{name}_eval_results.json", {name: value})
        written(tmp_path / f"results_{name}_full_info.json", [{"prompt_en": "a cat"}])
    assert read_results(tmp_path) == scores


@pytest.mark.parametrize(
    "content,message",
    [
        ({"colour": 0.5}, "'colour' is not a dimension"),
        ({"color": 85.0}, "'color' is 85.0; VBench's are fractions"),
        ({"color": ["0.5", []]}, "'color' is '0.5'; it must be a number"),
        ({"color": []}, "must be a number"),
        ({"color": True}, "must be a number"),
        ('{"color": NaN}', "must be a number"),
        ([0.5], "must map dimensions to scores"),
        ("{", "not JSON"),
    ],
)
def test_wrong_results_are_refused_by_file_and_name(tmp_path, content, message):
    path = written(tmp_path / "r_eval_results.json", content)
    with pytest.raises(UserError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)


def test_results_that_are_not_there_or_twice_there(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_results(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"no \*_eval_results\.json"):
        read_results(tmp_path)
    for name in "ab":
        written(tmp_path / f"{name}_eval_results.json", {"color": 0.5})
    with pytest.raises(UserError, match=r"b_eval_results\.json: color is in another file"):
        read_results(tmp_path)


FULL_INFO = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a cat",
        "dimension": ["object_class"],
        "auxiliary_info": {"object_class": "cat"},
    },
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["overall_consistency"]},
]


def test_prompts_of_the_full_list(tmp_path):
    path = written(tmp_path / "VBench_full_info.json", FULL_INFO)
    extended = written(
        tmp_path / "long.txt", "Stop,\u2028sign.\nA cat sits.\nBund one.\n Bund two.\r\n"
    )
    assert read_prompts(path, extended) == [
        Prompt("In a still frame, a stop sign", "Stop,\u2028sign.", 25),
        Prompt("a cat", "A cat sits.", 5),
        Prompt("The bund Shanghai, oil painting", "Bund two.", 5),
    ]
    assert [p.generate for p in read_prompts(path)] == [p.text for p in read_prompts(path)]


@pytest.mark.parametrize("flicker_first", [True, False])
def test_a_prompt_of_two_dimensions_gets_the_more_samples(tmp_path, flicker_first):
    dimensions = [["temporal_flickering"], ["color"]][:: 1 if flicker_first else -1]
    entries = [{"prompt_en": "a cat", "dimension": d} for d in dimensions]
    assert read_prompts(written(tmp_path / "i.json", entries)) == [Prompt("a cat", "a cat", 25)]


@pytest.mark.parametrize(
    "name,samples", [("all_dimension", 5), ("color", 5), ("temporal_flickering", 25)]
)
def test_plain_prompts_belong_to_the_dimension_of_their_file(tmp_path, name, samples):
    path = written(tmp_path / f"{name}.txt", "a cat\na dog \n\n")
    assert read_prompts(path) == [
        Prompt("a cat", "a cat", samples),
        Prompt("a dog", "a dog", samples),
    ]


@pytest.mark.parametrize(
    "content,message",
    [
        ("a cat\n\na dog\n", ":2 is empty"),
        ("a cat\nand/or a dog\n", "'and/or a dog' cannot be a file name"),
        ("é" * 124 + "e", "256 bytes, 255 are possible"),
        ("", ":1 is empty"),
    ],
)
def test_prompts_that_cannot_be_names_are_refused(tmp_path, content, message):
    path = written(tmp_path / "prompts.txt", content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [{"a": 1}, [], [{"prompt_en": "a cat"}], [{"prompt_en": 1, "dimension": []}]]
)
def test_other_json_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="is not VBench's list"):
        read_prompts(written(tmp_path / "info.json", content))


def test_extended_prompts_must_be_aligned(tmp_path):
    path, extended = (
        written(tmp_path / "a.txt", "a cat\na dog"),
        written(tmp_path / "b.txt", "A cat."),
    )
    with pytest.raises(UserError, match=r"b\.txt has 1 lines but .*a\.txt has 2 prompts"):
        read_prompts(path, extended)


def test_jobs_carry_the_original_prompt_in_the_name():
    got = jobs([Prompt("a cat", "A cat sits.", 2), Prompt("a dog-1", "a dog-1", 1)], 0)
    assert [(job.name, job.generate) for job in got] == [
        ("a cat-0.mp4", "A cat sits."),
        ("a cat-1.mp4", "A cat sits."),
        ("a dog-1-0.mp4", "a dog-1"),
    ]


def test_the_whole_suite_has_as_many_videos_as_vbench_counts():
    """944 prompts by 5, as its integrity check counts; 75 of them have 20 more for the static
    filter.
    """
    prompts = [Prompt(f"p{i}", "", 25 if i < 75 else 5) for i in range(944)]
    made = jobs(prompts, 0)
    assert len(made) == len({job.name for job in made}) == 4720 + 75 * 20


def test_seeds_are_spread_and_depend_on_nothing_but_seed_and_name():
    cat, dog = Prompt("a cat", "A cat.", 25), Prompt("a dog", "a dog", 5)
    both, alone = jobs([cat, dog], 7), jobs([dog], 7)
    assert both[25:] == alone
    assert [job.seed for job in jobs([cat._replace(generate="a cat")], 7)] == [
        job.seed for job in both[:25]
    ]
    seeds = {job.seed for seed in (7, 8) for job in jobs([cat, dog], seed)}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**31 for seed in seeds) and max(seeds) > 2**30 > min(seeds)
