"""Print what the real command answers to bad input, as a Markdown table: ``python tests/e2e/bad_input_table.py > docs/bad-input.md``."""

import re
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import CASES, STEPS, CannotTryError, World, stop_in, try_case
from conftest import TINY, make_weights

HEADER = """# Bad input

What the command answers to it, as `python tests/e2e/bad_input_table.py > docs/bad-input.md` printed it; `tests/e2e/test_bad_input.py` holds it
to that. Exit status 2 is a mistake that is seen before anything runs, 1 a step that failed (or an image that could not be labelled), 130 a run
that was stopped. `…` stands for a folder of the test.

| input | exit status | what it printed |
|---|---|---|"""


def shown(text: str, root: Path) -> str:
    """Return ``text`` for a cell: paths without the test's folder, long runs of a letter cut, nothing that Markdown would read."""
    text = re.sub(r"x{50,}", "xxx…", text.replace(str(root), "…").strip())
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ⏎ ") + "`" if text else ""


def row(name: str, status: int, printed: str) -> None:
    print(f"| {name} | {status} | {printed} |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        w = World(root, make_weights(TINY, root / "tiny.safetensors"))
        print(HEADER)
        with w.stack:
            for case in CASES:
                try:
                    result = try_case(w, case).result
                except CannotTryError as reason:
                    print(f"| {case.name} | | not tried here: {reason} |")
                    continue
                row(case.name, result.status, shown(result.stderr, root))
            for number in (signal.SIGINT, signal.SIGTERM):
                for step in STEPS:
                    stopped = stop_in(w, step, number)
                    row(f"{number.name} in {step}", stopped.result.status, shown(stopped.result.stderr, root))
            notes = [line.strip() for line in w.good.stdout.splitlines() if "cannot be decoded" in line]
            row(
                "CMYK, 16-bit, palette, alpha and rotated images, names with spaces, quotes and line breaks, links that loop, "
                "and fewer broken images than the share",
                w.good.status,
                shown("\n".join(notes), root),
            )


if __name__ == "__main__":
    main()
