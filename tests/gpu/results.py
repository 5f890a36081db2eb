"""Results of the GPU tests: a JSON file, written again after every test, and a table of it in docs/gpu.md.

python -m tests.gpu.results runs/gpu-results.json docs/gpu.md     # puts the table between the page's two marks
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


class Results:
    """Collects pytest's reports of the GPU tests into `path`."""

    def __init__(self, path: Path):
        self.path, self.tests, self.began = path, {}, time.time()

    def add(self, report) -> None:
        """Add the report of one phase of a test. The file is replaced as a whole, so it is complete at any time."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "values": {}})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        test["values"] |= {name: _plain(value) for name, value in report.user_properties}
        if report.outcome != "passed":
            test["outcome"], test["reason"] = report.outcome, _reason(report)
        if report.when == "teardown":
            self._write()

    def _write(self) -> None:
        from tests.gpu.place import machine

        data = {"machine": machine(), "seconds": round(time.time() - self.began, 1), "tests": self.tests}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=1))
        temporary.replace(self.path)


def table(data: dict) -> str:
    """Return the results as Markdown: the machine, and one row for each test."""
    machine = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    lines = [f"{machine}; {data['seconds']:.0f} s in all.", "", "| test | outcome | s | found |", "|---|---|---|---|"]
    for name, test in data["tests"].items():
        values = dict(test["values"])
        point = values.pop("point", None)
        words = "; ".join(f"{key} {_short(value)}" for key, value in values.items()) or test.get("reason", "")
        title = name.partition("::")[2] + (f" (point {point})" if point else "")
        cells = (title, test["outcome"], f"{test['seconds']:.0f}", words)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def put(page: str, content: str) -> str:
    """Return the page with `content` between its marks. Raises ValueError if it has no marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END} to put results between")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _reason(report) -> str:
    if report.outcome == "skipped":
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr))[:2000]


def _plain(value):
    return value if isinstance(value, int | float | str | bool | None | list | dict) else str(value)


def _short(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]


def main(source: Path, page: Path) -> None:
    """Put the results into the page, unless they are not of a GPU: all tests were skipped, or it was a rehearsal."""
    data = json.loads(source.read_text())
    if all(test["outcome"] == "skipped" for test in data["tests"].values()) or data["machine"]["gpus"] == "0":
        print(f"{source} has no results of a GPU: {page} stays as it is")
        return
    page.write_text(put(page.read_text(), table(data)))
    print(f"{page}: the results of {source}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
