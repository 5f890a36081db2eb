"""Write a run's report as one HTML file: rewards, speed, the time of each phase, and details of its rollouts.

    python tools/report.py runs/NAME
    python tools/report.py runs/NAME --out report.html

Every run writes runs/NAME/report.html at its end; use this tool for a run that is still going or has failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, help="default: report.html in the run's folder")
    args = parser.parse_args()
    from respec_trainer.errors import RespecError
    from respec_trainer.telemetry.page import write_page

    try:
        print(write_page(args.run, args.out))
    except RespecError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
