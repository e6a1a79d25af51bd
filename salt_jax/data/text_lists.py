from pathlib import Path


def read_prompts(path):
    return [l.strip() for l in Path(path).read_text(encoding="utf-8-sig").split("\n") if l.strip()]
