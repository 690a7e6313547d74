"""Launch training.

    python -m launch run --gpus 8 -- experiment=pg19_150m                        on this machine, or on several by hand
    python -m launch slurm --nodes 4 --gpus-per-node 8 -- experiment=pg19_480m   as a SLURM job, or an array of jobs
    python -m launch sweep --gpus 8 -- experiment=pg19_70m model=sw,sw_ovq       many runs on this machine
    python -m launch plan experiment=pg19_480m gpus=64 gpu=h100                  what a run would take; starts nothing

`python -m launch COMMAND --help` lists a command's options.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {"run": "launch.run", "slurm": "launch.slurm", "sweep": "launch.sweep", "plan": "launch.plan"}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in COMMANDS:
        return importlib.import_module(COMMANDS[given[0]]).main(given[1:])
    if given[:1] in (["--help"], ["-h"]):
        print((__doc__ or "").strip())
        return 0
    named = f"'{given[0]}' is not a command" if given else "no command was given"
    print(f"error: {named}; legal: {', '.join(COMMANDS)}; see python -m launch --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
