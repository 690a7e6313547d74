"""One HTML file about several runs, finished or not: results, curves, paired differences, settings, failures.

    python -m eval.report runs=[runs/a,runs/b] out=report.html
    python -m eval.report model=sw,sw_ovq seed=0,1 experiment=recall    the runs of a sweep, given by its settings

The file contains its pictures and numbers, runs no script and needs no network. Runs are compared with the first one,
or with `base`: document by document where both were evaluated on the same text, seed by seed where there are several.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from eval.report_page import page
from eval.run_facts import Facts, facts_of
from launch import sweep
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.machine import code_commit, command_line
from ovq.schema import setting
from ovq.values import expand

LARGEST = 2_000_000  # bytes that an e-mail or an issue accepts
POINTS = 40_000  # of all training curves together; fewer if the file would be too large


@dataclass
class Options:
    runs: list[str] = setting(
        [], "run folders, [a,b] or a pattern as in [runs/*]; empty: those of the sweep given instead", paths=True
    )
    base: str | None = setting(None, "run folder that others are compared with; null: the first", paths=True)
    positions: list[int] = setting([4096, 16384, 65536], "positions of the table, in tokens", at_least=1)
    out: str = setting("report.html", "file to write", endings=(".html", ".htm"), writes="file")
    trust: list[str] = setting([], "classes outside this project that the runs' configs may name; their code then runs")


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    folders = folders_of(expand(options.runs, holding="config.yaml"), overrides)
    runs = [facts_of(folder, options.trust) for folder in folders]
    known = [run for run in runs if run.cfg is not None]
    if not known:
        raise ConfigError(f"none of the {len(runs)} folders is a run that has begun; first: {runs[0].run_dir}")
    base = known[0] if options.base is None else named(known, options.base)
    for points in (POINTS, POINTS // 4, POINTS // 40):
        text = page(runs, base, options.positions, max(20, points // len(runs)), command_line(), code_commit())
        if len(text.encode()) < LARGEST:
            break
    path = Path(options.out)
    write_whole(path, text)
    finished = sum(run.status == "finished" for run in runs)
    print(f"{path}: {len(runs)} runs, {finished} finished, {len(text.encode()):,} bytes")
    return 0


def folders_of(runs: list[str], overrides: list[str]) -> list[Path]:
    """The named folders, or those of a sweep.

    Raises:
        ConfigError: both or neither are given, or a folder does not exist.
    """
    if bool(runs) == bool(overrides):
        raise ConfigError("give run folders, runs=[a,b], or the settings of a sweep, for instance model=sw,sw_ovq")
    if not runs:
        return [job.run_dir for job in sweep.expand(overrides)]
    for run in runs:
        if not Path(run).is_dir():
            raise ConfigError(f"runs: there is no folder {run}")
    return [Path(run) for run in runs]


def named(runs: list[Facts], base: str) -> Facts:
    for run in runs:
        if run.run_dir.resolve() == Path(base).resolve():
            return run
    raise ConfigError(f"base={base} is not one of the runs, or has not begun")


if __name__ == "__main__":
    sys.exit(main())
