"""Lists as editors, spreadsheets and shells leave them; expected are the lines that were put in."""

import json

import pytest

from salt_jax.data.text_lists import LISTED, read_lines, read_prompts, read_table, read_text
from salt_jax.errors import UserError

CAT, DOG = "A cat, asleep.", "Ein Hündchen"


def put(tmp_path, content, name="p.txt"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    "text",
    [
        f"{CAT}\n{DOG}\n",
        f"{CAT}\r\n{DOG}",
        f"\ufeff{CAT}\r\n{DOG}\r\n\r\n",
        f"\ufeff{CAT}\n\ufeff{DOG}\n",  # joined with cat
        f"  {CAT}\t\n\u3000{DOG}\u200b\n\ufeff\n \n",
        f"{CAT}\r\r\n{DOG}\r\r\n",  # written as text twice
        f"{CAT}\n{DOG}\n\x1a",  # of DOS
    ],
)
def test_lines_are_what_was_written(tmp_path, text):
    assert read_lines(put(tmp_path, text)) == [CAT, DOG]
    assert [prompt.text for prompt in read_prompts(put(tmp_path, text))] == [CAT, DOG]


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\x1c", "\x1e"])
def test_nothing_else_ends_a_line(tmp_path, mark):
    assert read_lines(put(tmp_path, f"A{mark}cat\nA dog")) == [f"A{mark}cat", "A dog"]
    for name, text in {
        "p.csv": f"id,prompt\n1,A{mark}cat\n2,A dog\n",
        "p.jsonl": json.dumps({"prompt": f"A{mark}cat"}, ensure_ascii=False)
        + '\n{"prompt": "A dog"}',
    }.items():
        assert [prompt.text for prompt in read_prompts(put(tmp_path, text, name))] == [
            f"A{mark}cat",
            "A dog",
        ]


def test_blank_lines_keep_their_place(tmp_path):
    file = put(tmp_path, "A\n\n \u200b\nB\n\n")
    assert read_lines(file) == ["A", "", "", "B"]
    assert [(prompt.name, prompt.text) for prompt in read_prompts(file)] == [
        ("prompt 1", "A"),
        ("prompt 2", "B"),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (CAT.encode("utf-16"), "is not UTF-8 .it is UTF-16.; save it as UTF-8"),
        (b"\xfe\xff" + CAT.encode("utf-16-be"), "it is UTF-16"),
        (CAT.encode("utf-32"), "it is UTF-32"),
        (CAT.encode("utf-16-le"), "as in UTF-16"),
        (CAT.encode("utf-16-be"), "as in UTF-16"),
        (DOG.encode("latin-1"), "byte 5 is 0xfc, as in Latin-1"),
        (DOG.encode("cp1252"), "byte 5 is 0xfc, as in Latin-1, Windows-1252"),
        (DOG.encode()[:6], "byte 5 is 0xc3"),
        (b"A cat\nA\0 dog", "line 2 of .*p.txt has a NUL character"),
        (b"A cat\rA dog\r", "line 1 of .*p.txt has a carriage return inside"),
        (b"A cat\nA dog\rA cow\n", "line 2 of .*p.txt has a carriage return inside"),
        (b"", "has no prompt"),
        (b" \n\xef\xbb\xbf\n", "has no prompt"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(put(tmp_path, content))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["absent.txt", "absent.csv", ".", "a\0b", "x" * 300])
def test_files_that_cannot_be_opened(tmp_path, name):
    with pytest.raises(UserError, match="cannot read"):
        read_text(tmp_path / name)


def test_prompts_of_every_kind(tmp_path):
    rows = [{"caption": CAT}, {"other": 1}, {"caption": ["A cow"]}, {"caption": DOG}]
    kinds = {
        "p.csv": f'uuid,prompt\n1,"{CAT}"\n2,\n3,{DOG}\n',
        "p.CSV": f"prompt;uuid\n{CAT};1\n;2\n{DOG};3\n",
        "p.tsv": f"\ufeffuuid\tprompt\r\n1\t{CAT}\r\n3\t{DOG}\r\n",
        "p.jsonl": "\n\n".join(map(json.dumps, rows)),
        "p.json": json.dumps(rows, indent=1),
    }
    for name, text in kinds.items():
        prompts = read_prompts(put(tmp_path, text, name))
        assert [prompt.text for prompt in prompts if not prompt.problem] == [CAT, DOG]
        bad = {prompt.name: prompt.problem for prompt in prompts if prompt.problem}
        if "json" not in name:
            assert not bad
        else:
            places = ("line 3", "line 5") if name == "p.jsonl" else ("entry 2", "entry 3")
            assert bad == {
                "prompt 2": f"{places[0]} of {name}: its 'caption' is missing, not a text",
                "prompt 3": f"{places[1]} of {name}: its 'caption' is a list, not a text",
            }


def test_an_unquoted_comma_cuts_no_prompt(tmp_path):
    prompts = read_prompts(put(tmp_path, f"prompt\n{CAT}\n{DOG}\n", "p.csv"))
    assert [prompt.text for prompt in prompts] == ["", DOG]
    assert (
        prompts[0].problem
        == "row 1 of p.csv: it has 2 cells, the header 1; quote captions that have a ','"
    )
    with pytest.raises(UserError, match=r"has no prompt .row 1 of p.csv: it has 2 cells"):
        read_prompts(put(tmp_path, f"prompt\n{CAT}\n", "p.csv"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "t.csv",
            'file,text\na.mp4,"A cat\nb.mp4,A dog\n',
            "cannot be read as csv near row 1 .unexpected end",
        ),
        ("t.csv", 'file,text\na.mp4,x\nb.mp4,"big" dog\n', "cannot be read as csv near row 2"),
        (
            "t.csv",
            "file,text\na.mp4," + "x" * 200_000,
            "cannot be read as csv near row 1 .field larger",
        ),
        ("t.csv", "file,file,text\na,b,c", "header of .*t.csv has 'file' twice"),
        ("t.csv", "", "t.csv has no row"),
        ("t.jsonl", "[" * 100_000, "line 1 of .*t.jsonl is not JSON"),
        ("t.json", "[" * 100_000, "t.json is not JSON"),
        (
            "t.jsonl",
            '{"file": ' + "9" * 5000 + "}",
            "line 1 of .*t.jsonl is not JSON .Exceeds the limit",
        ),
        ("t.jsonl", '{"text": "A", "text": "B"}', "line 1 of .*t.jsonl has 'text' twice"),
        ("t.json", '{"a.mp4": "A cat"}', "t.json is no list of JSON objects"),
        ("t.json", '["A cat"]', "entry 1 of .*t.json is no JSON object"),
        ("t.parquet", b"PAR1", "must end in .csv, .tsv, .jsonl, .json"),
    ],
)
def test_damaged_tables_are_refused_in_one_sentence(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as refused:
        read_table(put(tmp_path, content, name))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_no_message_lists_all_columns(tmp_path):
    names = ",".join(f"c{i:03d}" for i in range(300))
    with pytest.raises(
        UserError, match=r"'c009'\] and 290 more; one must be called caption"
    ) as refused:
        read_prompts(put(tmp_path, f"{names}\n{names}\n", "t.csv"))
    assert str(refused.value).count("'") == 2 * LISTED


@pytest.mark.parametrize("value", ["A\\u0000 cat", "\\ud83d"])
def test_characters_that_no_text_has_are_named(tmp_path, value):
    prompts = read_prompts(put(tmp_path, f'{{"text": "{value}"}}\n{{"text": "A dog"}}', "p.jsonl"))
    assert (
        "NUL character or half a surrogate pair" in prompts[0].problem
        and prompts[1].text == "A dog"
    )


def test_a_quoted_caption_of_several_lines_stays_one(tmp_path):
    rows = read_table(put(tmp_path, 'file,caption\r\na.mp4,"A cat,\r\nasleep"\r\n', "t.csv"))
    assert [row.cells for row in rows] == [{"file": "a.mp4", "caption": "A cat,\r\nasleep"}]
    (prompt,) = read_prompts(tmp_path / "t.csv")
    assert prompt.text == "A cat,\nasleep"
