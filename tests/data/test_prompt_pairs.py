"""Prompts with the prompts to which their videos change."""

import json

import pytest

from salt_jax.data.prompt_pairs import read_pairs
from salt_jax.data.text_lists import read_prompts
from salt_jax.errors import UserError

CAT, SITS, DOG, RUNS = "A cat, black.", "The cat sits.", "A dog.", "The dog runs."


def put(folder, name, text):
    (folder / name).write_bytes(text.encode())
    return folder / name


def pairs(found):
    return [(p.name, p.text, p.switch) for p in found if not p.problem]


PAIRS = [("prompt 1", CAT, SITS), ("prompt 2", DOG, RUNS)]


def test_line_by_line_in_two_files(tmp_path):
    """LongLive's two lists; pairs of blank lines are left out, and blank ends do not count."""
    one = put(tmp_path, "p.txt", f"{CAT}\n\n{DOG}\n\n\n")
    two = put(tmp_path, "s.txt", f"\ufeff{SITS}\r\n\r\n{RUNS}\r\n")
    assert pairs(read_pairs(one, two)) == PAIRS
    table = put(tmp_path, "s.csv", f'prompt\n"{SITS}"\n{RUNS}\n')
    assert pairs(read_pairs(put(tmp_path, "q.txt", f"{CAT}\n{DOG}"), table)) == PAIRS


@pytest.mark.parametrize("column", ["switch_prompt", "switch", "Switch_Prompt"])
def test_in_a_column_of_their_table(tmp_path, column):
    rows = [{"prompt": CAT, column: SITS}, {"prompt": DOG, column: RUNS}]
    files = {
        "p.jsonl": "\n".join(map(json.dumps, rows)),
        "p.json": json.dumps(rows),
        "p.csv": f'prompt,{column}\n"{CAT}",{SITS}\n{DOG},{RUNS}\n',
    }
    for name, text in files.items():
        assert pairs(read_pairs(put(tmp_path, name, text))) == PAIRS


def test_without_pairs_prompts_are_as_they_were(tmp_path):
    for name, text in (("p.txt", f"{CAT}\n\n{DOG}"), ("p.jsonl", json.dumps({"prompt": CAT}))):
        file = put(tmp_path, name, text)
        assert read_pairs(file) == read_prompts(file)
        assert not any(p.switch for p in read_pairs(file))


def test_one_of_a_pair_alone_is_a_problem_of_its_own(tmp_path):
    """The others go on."""
    one, two = put(tmp_path, "p.txt", f"{CAT}\n\n{DOG}"), put(tmp_path, "s.txt", f"{SITS}\nx\n")
    with pytest.raises(UserError, match=r"has 3 prompts and .*s\.txt has 2; give each prompt its"):
        read_pairs(one, two)
    two = put(tmp_path, "s.txt", f"{SITS}\n{RUNS}\n\n.")
    one = put(tmp_path, "p.txt", f"{CAT}\n\n{DOG}\n.")
    found = read_pairs(one, two)
    assert pairs(found) == [PAIRS[0], ("prompt 4", ".", ".")]
    assert [p.problem for p in found if p.problem] == [
        "line 2 of p.txt: it has no prompt, but a switch prompt",
        "line 3 of p.txt: it has no switch prompt",
    ]
    rows = [{"prompt": CAT, "switch": SITS}, {"prompt": DOG, "switch": 3}, {"prompt": DOG}]
    found = read_pairs(put(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert pairs(found) == PAIRS[:1]
    assert [p.problem for p in found[1:]] == [
        "line 2 of p.jsonl: its 'switch' is a number, not a text",
        "line 3 of p.jsonl: its 'switch' is missing, not a text",
    ]


def test_a_column_and_a_file_of_them_are_refused_in_one_sentence(tmp_path):
    file = put(tmp_path, "p.jsonl", json.dumps({"prompt": CAT, "switch_prompt": SITS}))
    with pytest.raises(UserError, match=r"has a column 'switch_prompt' and --switch_prompts=") as e:
        read_pairs(file, put(tmp_path, "s.txt", RUNS))
    assert "\n" not in str(e.value)
