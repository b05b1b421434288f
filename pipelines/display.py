"""What the user sees while a pipeline runs: a line a step, with a bar on long work. Quiet where the output is no terminal."""

import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from graftwork.tracking import JournalReader

WORDS = {
    "ingest_data": "ingest the data",
    "validate_data": "validate the data",
    "extract_features": "extract frozen features",
    "train_baseline": "train the baseline",
    "fine_tune": "fine-tune",
    "train_scratch": "train from scratch (control)",
    "evaluate_model": "evaluate",
    "register_model": "register",
}


class Display(threading.Thread):
    """Follows the journals of a run and draws them, until ``close``."""

    def __init__(self, console: Console, journals: Path, steps: list[str]) -> None:
        super().__init__(daemon=True, name="graftwork-display")
        self.console, self.steps = console, steps
        self.state: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._reader = JournalReader(journals)
        self._closing = threading.Event()
        self._printed: set[str] = set()

    def run(self) -> None:
        if not self.console.is_terminal:
            while not self._closing.wait(0.2):
                self._poll()
            self._poll()
            return
        with Live(self._draw(), console=self.console, refresh_per_second=8, transient=False) as live:
            while not self._closing.wait(0.15):
                self._poll()
                live.update(self._draw())
            self._poll()
            live.update(self._draw())

    def close(self) -> None:
        self._closing.set()
        self.join(5)

    def _poll(self) -> None:
        for step, event in self._reader.poll():
            state = self.state.setdefault(step, {"started": event["time"]})
            if event["event"] == "start":
                self._print_reused_before(step)
            if event["event"] == "progress":
                state["done"], state["total"] = event["done"], event["total"]
            elif event["event"] == "metrics" and "val_accuracy" in event["values"]:
                state["val_accuracy"] = event["values"]["val_accuracy"]
            elif event["event"] == "note":
                self._say(step, event["message"])
            elif event["event"] == "tags" and "graftwork.reused_from" in event["values"]:
                state["reused"] = True
            elif event["event"] == "end":
                state["ended"], state["status"] = event["time"], event["status"]
                if not self.console.is_terminal:
                    self._print_line(step)

    def _say(self, step: str, message: str) -> None:
        if self.console.is_terminal:
            self.notes.append(message)
        else:
            self.console.print(f"  {step}: {escape(message)}", soft_wrap=True, highlight=False)

    def _print_reused_before(self, step: str) -> None:
        """Say of the steps before ``step`` that have not begun that they never will: what they make was there already."""
        for earlier in self.steps[: self.steps.index(step)]:
            if earlier not in self.state and earlier not in self._printed and not self.console.is_terminal:
                self._printed.add(earlier)
                self.console.print(f"  {WORDS.get(earlier, earlier)}: reused", highlight=False)

    def _print_line(self, step: str) -> None:
        if step in self._printed:
            return
        self._printed.add(step)
        state = self.state[step]
        mark = {"FINISHED": "done", "KILLED": "stopped"}.get(state["status"], "FAILED")
        how = "reused" if "reused" in state else f"{mark} in {state['ended'] - state['started']:.1f} s"
        self.console.print(f"  {WORDS.get(step, step)}: {how}", highlight=False)

    def _draw(self) -> Group:
        table = Table.grid(padding=(0, 2))
        reached = [step for step in self.steps if step in self.state]
        for step in self.steps:
            state = self.state.get(step)
            if state is None:
                # A later step has begun: what this one would make was there already.
                reused = bool(reached) and self.steps.index(step) < self.steps.index(reached[-1])
                table.add_row(
                    "✓" if reused else " ",
                    Text(WORDS.get(step, step), style="" if reused else "dim"),
                    "",
                    "reused" if reused else "",
                )
                continue
            if "reused" in state:
                table.add_row("[green]✓[/]", WORDS.get(step, step), "", "reused")
                continue
            seconds = f"{state.get('ended', time.time()) - state['started']:.0f} s"
            accuracy = f"val {state['val_accuracy']:.3f}" if "val_accuracy" in state else ""
            if "ended" in state:
                mark = {"FINISHED": "[green]✓[/]", "KILLED": "[yellow]■[/]"}.get(state["status"], "[red]✗[/]")
                table.add_row(mark, WORDS.get(step, step), "", f"{seconds}  {accuracy}")
            else:
                bar = ProgressBar(state.get("total", 100), state.get("done", 0), width=24) if "total" in state else ""
                table.add_row("…", Text(WORDS.get(step, step), style="bold"), bar, f"{seconds}  {accuracy}")
        return Group(table, *(Text(f"  {note}", style="dim") for note in self.notes[-4:]))
