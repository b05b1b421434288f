"""Print what ``graftwork data inspect`` answers to bad data, as Markdown: ``python tests/data_corpus_table.py > docs/bad-data.md``."""

import json
import re
import sys
import tempfile
from pathlib import Path

# The root as well: a folder of tests is called graftwork.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import s3_server  # noqa: E402
from data_corpus import FAMILIES, CannotTryError, Tried, try_case  # noqa: E402

HEADER = """# Bad data

What `graftwork data inspect` answers to it, as `python tests/data_corpus_table.py > docs/bad-data.md` printed it;
`tests/pipelines/test_data_corpus.py` holds it to that, and that it leaves nothing half-made. Exit status 0: usable, with warnings or without;
1: a critical finding, or nothing that can be used; 2: a mistake that is seen before anything is packed. `…` stands for a folder of the test,
and ⏎ for the end of a line. The first lines, which are the same everywhere, are left out. All good images beside the bad ones are used."""


def shown(tried: Tried, root: Path) -> str:
    """Return what was printed for a cell: findings and verdict, paths without the test's folder, nothing that Markdown would read."""
    text = (tried.stdout + tried.stderr).replace(str(root), "…").replace(tempfile.gettempdir(), "…")
    lines = [line for line in text.splitlines() if not re.match(r"graftwork  |[\d,]+ images \(", line)]
    text = re.sub(r"([xcd])\1{50,}", r"\1\1\1…", " ⏎ ".join(lines).strip())
    text = re.sub(r"127\.0\.0\.1:\d+|corpus-[0-9a-f]{8}", lambda m: "127.0.0.1:…" if ":" in m[0] else "bucket", text)
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`" if text else ""


def reasons(tried: Tried) -> str:
    """Return the reasons that the page gives for what was left out, where the line names the first of them alone."""
    if not (tried.kept / "dataset.json").is_file():
        return ""
    broken = json.loads((tried.kept / "dataset.json").read_text(encoding="utf-8"))["broken"]
    return (
        "; on the page also: `" + "; ".join(f"{b['source']}: {b['reason']}" for b in broken[5:20]) + "`"
        if len(broken) > 5
        else ""
    )


def main() -> None:
    print(HEADER)
    with tempfile.TemporaryDirectory() as temporary, s3_server.serve(Path(temporary) / "s3") as server:
        for family, cases in FAMILIES.items():
            print(f"\n## {family}\n\n| case | exit status | what it printed |\n|---|---|---|")
            for n, case in enumerate(cases):
                root = (Path(temporary) / f"{family}-{n}").resolve()
                root.mkdir()
                try:
                    tried = try_case(case, root, server)
                    print(f"| {case.name} | {tried.status} | {shown(tried, root)}{reasons(tried)} |", flush=True)
                except CannotTryError as reason:
                    print(f"| {case.name} | | not tried here: {reason} |", flush=True)


if __name__ == "__main__":
    main()
