"""How long the command takes to start: `aligncurate --help`, `aligncurate models`, `import aligncurate`.

    python -m benchmarks.start --save

Each runs in a new process, next to an empty Python program and one that imports torch for comparison. The first run of
each is a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.common import Spread, publish, undisturbed

COMMANDS = {
    "aligncurate --help": ["-m", "aligncurate", "--help"],
    "aligncurate models": ["-m", "aligncurate", "models"],
    "import aligncurate": ["-c", "import aligncurate"],
    "python, nothing": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    others = dict.fromkeys(COMMANDS, 0.0)
    for turn in range(options.rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds, share = undisturbed(lambda arguments=arguments: start(arguments))
            if turn:
                taken[name].append(seconds)
                others[name] = max(others[name], share)
    base = statistics.median(taken["python, nothing"])
    rows = [
        {
            "command": name,
            "seconds": Spread.of(values),
            "over nothing": statistics.median(values) - base,
            "others": f"{others[name]:.0%}",
        }
        for name, values in taken.items()
    ]
    publish("start", "seconds until done: median (least..most)", rows, {"rounds": options.rounds}, options.save)


def start(arguments: list[str]) -> float:
    """Seconds of one new Python process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
