"""Folders, tables and lists are written by hand; what must be found in them is what was written."""

import json

import pytest

from salt_jax.data.video_folder import find_videos
from salt_jax.errors import UserError


def folder(tmp_path, **captions):
    """Empty files that look like videos, each with its caption beside it."""
    for name, caption in captions.items():
        (tmp_path / f"{name}.mp4").touch()
        if caption is not None:
            (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    return tmp_path


def told(videos):
    return [(v.name, v.caption, v.problem) for v in videos]


def test_captions_beside_videos(tmp_path):
    folder(tmp_path, b=" Ein Kätzchen.\n", a="A cat.", bare=None, blank=" \n")
    (tmp_path / "more").mkdir()
    folder(tmp_path / "more", c="More.")
    for hidden in (".hidden.mp4", "._a.mp4", "picture.png"):
        (tmp_path / hidden).touch()
    (tmp_path / "latin.webm").touch()
    (tmp_path / "latin.txt").write_bytes("Kätzchen".encode("latin-1"))
    found = find_videos(tmp_path, None)
    assert told(found)[:4] == [
        ("a.mp4", "A cat.", ""),
        ("b.mp4", "Ein Kätzchen.", ""),
        ("bare.mp4", "", "no caption: there is no bare.txt beside it"),
        ("blank.mp4", "", "no caption: blank.txt is empty"),
    ]
    assert (
        found[4].name == "latin.webm"
        and "latin.txt is not UTF-8 (byte 1 is 0xe4" in found[4].problem
    )
    assert told(found)[5:] == [("more/c.mp4", "More.", "")] and found[5].file.is_file()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("file_column, caption_column", [("file", "caption"), ("path", "text")])
def test_captions_in_a_table(tmp_path, kind, file_column, caption_column):
    folder(tmp_path, a=None, b=None, c=None)
    rows = [
        ("b.mp4", 'A "dog", running'),
        ("a.mp4", "Zwei\nZeilen ä"),
        ("b.mp4", "again"),
        ("x.mp4", "gone"),
        ("c.mp4", ""),
    ]
    table = tmp_path / f"captions.{kind}"
    if kind == "csv":
        quoted = ['"' + caption.replace('"', '""') + '"' for _, caption in rows]
        lines = [f"{name},7,{caption}" for (name, _), caption in zip(rows, quoted, strict=True)]
        table.write_text(
            "\n".join([f"{file_column},seconds,{caption_column}", *lines]), encoding="utf-8-sig"
        )
    else:
        lines = [json.dumps({file_column: name, caption_column: caption}) for name, caption in rows]
        table.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "late.mkv").touch()
    assert told(find_videos(tmp_path, table)) == [
        ("b.mp4", 'A "dog", running', ""),
        ("a.mp4", "Zwei\nZeilen ä", ""),
        ("b.mp4", "again", ""),
        ("x.mp4", "gone", f"{tmp_path / 'x.mp4'} does not exist"),
        ("c.mp4", "", f"no caption: its '{caption_column}' in captions.{kind} is empty"),
        ("late.mkv", "", f"no caption: not in captions.{kind}"),
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "t.csv",
            "name,words\na.mp4,hello",
            r"columns \['name', 'words'\]; one must be called file or path",
        ),
        ("t.csv", "file,words\na.mp4,hello", "one must be called caption or text"),
        ("t.jsonl", '{"file": "a.mp4", "text": "x"}\n{"file"', "line 2 of .*t.jsonl is not JSON"),
        ("t.jsonl", '["a.mp4"]', "line 1 of .*t.jsonl is no JSON object"),
        ("t.xlsx", "[]", "must end in .csv, .tsv, .jsonl, .json"),
        ("t.json", "[]", "t.json has no row"),
        ("t.csv", "file,text", "t.csv has no row"),
        ("t.csv", "file,text,text\na.mp4,x,y", "header of .*t.csv has 'text' twice"),
        ("t.csv", b"file,text\na.mp4,\xff", "t.csv is not UTF-8"),
        ("t.csv", None, "cannot read .*t.csv"),
        (
            "t.csv",
            "file,text\nx.mp4,hello",
            r"no video with a caption \(x.mp4: .* does not exist\)",
        ),
    ],
)
def test_unusable_tables_are_named(tmp_path, name, content, message):
    folder(tmp_path, a=None)
    table = tmp_path / name
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        find_videos(tmp_path, table)


def test_folders_without_videos_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no video with a caption; it needs files ending in .mp4"):
        find_videos(tmp_path, None)
    with pytest.raises(UserError, match="there is no folder"):
        find_videos(tmp_path / "nowhere", None)


def reasons(videos):
    return {video.name: video.problem for video in videos if video.problem}


def test_every_file_that_could_be_meant_is_named(tmp_path):
    """Videos by their suffix, whatever has a caption, captions that stand alone: each is a source,
    once.
    """
    for name in (
        "a.MP4",
        "b.ts",
        "c.webp",
        "d.xyz",
        "e.mp4",
        "e.jpg",
        "f.mp4",
        "f.mov",
        "g.m2ts",
        "sub.dir/h.wmv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in (
        "a.TXT",
        "b.txt",
        "c.txt",
        "d.txt",
        "e.txt",
        "f.txt",
        "alone.txt",
        "sub.dir/h.txt",
    ):
        (tmp_path / name).write_text("A cat.")
    for name in ("a.json", "e.srt", "picture.png", ".hidden.ts", "alone.json"):
        (tmp_path / name).touch()
    found = find_videos(tmp_path, None)
    assert [video.name for video in found] == [
        *(
            "a.MP4",
            "alone.txt",
            "b.ts",
            "c.webp",
            "d.xyz",
            "e.mp4",
            "f.mov",
            "f.mp4",
            "g.m2ts",
            "sub.dir/h.wmv",
        )
    ]
    assert reasons(found) == {
        "alone.txt": "it is a caption without a video: none of that name is beside it",
        "g.m2ts": "no caption: there is no g.txt beside it",
    }


def test_what_is_no_file_is_named(tmp_path):
    import os

    folder(tmp_path, a="A cat.")
    (tmp_path / "more").mkdir()
    folder(tmp_path / "more", b="A dog.")
    for name in ("link", "pipe", "other"):
        (tmp_path / f"{name}.txt").write_text("A cat.")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    (tmp_path / "other.mp4").symlink_to(tmp_path / "a.mp4")
    (tmp_path / "folder").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    found = find_videos(tmp_path, None)
    assert [video.name for video in found if not video.problem] == [
        "a.mp4",
        "more/b.mp4",
        "other.mp4",
    ]
    assert reasons(found) == {
        "folder": (
            "it is a link to a folder, which is not followed; put the videos themselves there"
        ),
        "link.mp4": f"{tmp_path / 'link.mp4'} is a link to nothing",
        "pipe.mp4": f"{tmp_path / 'pipe.mp4'} is no file",
    }


def test_rows_that_do_not_fit_the_header_are_named_and_not_cut(tmp_path):
    folder(tmp_path, a=None, b=None, c=None, d=None)
    (tmp_path / "t.csv").write_text(
        'file,caption\na.mp4,A cat, running\nb.mp4\nc.mp4,"A dog, asleep"\n,\n\nd.mp4,A cow,\n'
    )
    assert told(find_videos(tmp_path, tmp_path / "t.csv")) == [
        (
            name,
            caption,
            f"{row} of t.csv: it has {n} cells, the header 2; quote captions that have a ','"
            if row
            else "",
        )
        for name, caption, row, n in (
            ("a.mp4", "", "row 1", 3),
            ("b.mp4", "", "row 2", 1),
            ("c.mp4", "A dog, asleep", "", 2),
            ("d.mp4", "", "row 4", 3),
        )
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_captions_that_are_no_text_are_named_and_not_made_up(tmp_path, kind):
    values = {
        '["A cat."]': "a list",
        "NaN": "a number",
        "7": "a number",
        "null": "null",
        '{"en": "A cat."}': "an object",
        "true": "true or false",
    }
    names = [f"v{i}" for i in range(len(values))]
    folder(tmp_path, good=None, **dict.fromkeys(names))
    lines = [
        f'{{"file": "{name}.mp4", "caption": {value}}}'
        for name, value in zip(names, values, strict=True)
    ]
    lines += [
        '{"file": "good.mp4", "caption": "A dog."}',
        '{"file": "good.mp4"}',
        '{"file": 7, "caption": "x"}',
    ]
    text = "\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / f"t.{kind}").write_text(text)
    place = "line" if kind == "jsonl" else "entry"
    wanted = [
        (f"{name}.mp4", "", f"{place} {i} of t.{kind}: its 'caption' is {what}, not a text")
        for i, (name, what) in enumerate(zip(names, values.values(), strict=True), 1)
    ]
    assert told(find_videos(tmp_path, tmp_path / f"t.{kind}")) == [
        *wanted,
        ("good.mp4", "A dog.", ""),
        ("good.mp4", "", f"{place} 8 of t.{kind}: its 'caption' is missing, not a text"),
        (f"{place} 9 of t.{kind}", "x", "its 'file' is a number, not a text"),
    ]


def test_rows_that_lead_elsewhere_are_named(tmp_path):
    (tmp_path / "videos").mkdir()
    inside = folder(tmp_path / "videos", a=None)
    folder(tmp_path, outside=None)
    rows = [
        str(inside / "a.mp4"),
        "../outside.mp4",
        str(tmp_path / "outside.mp4"),
        "./a.mp4",
        "x" * 300 + ".mp4",
        ".",
    ]
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"file": row, "caption": "A cat."}) for row in rows)
    )
    found = find_videos(inside, tmp_path / "t.jsonl")
    assert [bool(video.problem) for video in found] == [False, True, True, False, True, True]
    for video, row in zip(found[1:3], (2, 3), strict=True):
        assert video.problem == f"line {row} of t.jsonl: it lies outside {inside}"


def test_tables_of_spreadsheets_are_read(tmp_path):
    """Excel's semicolons where a comma is the decimal point, tabs, pandas' nameless index, names in
    capitals.
    """
    folder(tmp_path, a=None, b=None)
    for name, text in {
        "t.csv": 'File;Caption\r\na.mp4;A cat, running\r\nb.mp4;"A ""dog""; asleep"\r\n',
        "tab.csv": 'file\tcaption\na.mp4\tA cat, running\nb.mp4\t"A ""dog""; asleep"\n',
        "t.tsv": 'file\tcaption\na.mp4\tA cat, running\nb.mp4\t"A ""dog""; asleep"\n',
        "index.csv": ',file,seconds,seconds,caption\n0,a.mp4,,,"A cat, running"\n'
        '1,b.mp4,,,"A ""dog""; asleep"\n',
        "mac.csv": 'file,caption\ra.mp4,"A cat, running"\rb.mp4,"A ""dog""; asleep"\r',
    }.items():
        (tmp_path / name).write_bytes(text.encode())
        assert told(find_videos(tmp_path, tmp_path / name)) == [
            ("a.mp4", "A cat, running", ""),
            ("b.mp4", 'A "dog"; asleep', ""),
        ]


def test_captions_of_windows_editors_beside_videos(tmp_path):
    folder(tmp_path, a=None, b=None, c=None)
    (tmp_path / "a.txt").write_bytes("\ufeffA cat,\r\nasleep.\r\n".encode())
    (tmp_path / "b.txt").write_bytes("A cat.".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes("\ufeff \r\n".encode())
    found = told(find_videos(tmp_path, None))
    assert found[0] == ("a.mp4", "A cat,\nasleep.", "")
    assert (
        found[1][2]
        == f"no caption: {tmp_path / 'b.txt'} is not UTF-8 (it is UTF-16); save it as UTF-8"
    )
    assert found[2][2] == "no caption: c.txt is empty"
