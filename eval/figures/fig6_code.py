"""Figure 6 on another text: loss by position on Python source, which repeats itself more than books do.

    python -m data.python_source out=runs/python             the text, then data.prepare: see the README
    python -m eval.figures.fig6_code dry_run=true data=memmap 'data.train=[DIR]' tokenizer.model_path=FILE
    python -m eval.figures.fig6_code data=memmap 'data.train=[DIR]' tokenizer.model_path=FILE

The models, their training and the tests are those of figure 6 at CPU scale.
Runs are ordinary train.py runs, reused or resumed if they exist. Settings of train.py are passed on to every run on
the text.
"""

from __future__ import annotations

import sys

from eval.figures.declare import CODE, Figure, Panel
from eval.figures.fig6 import ABOUT, CURVES, MODELS, SMALL, Figure6Options, draw, findings, models_on_text, tests_of
from eval.figures.make import make
from ovq.cli import command


def figure(options: Figure6Options) -> Figure:
    return Figure(
        name="fig6_code",
        title="Figure 6 on Python source: loss by position",
        panels=(Panel(CODE.name, CODE, models_on_text(options.scale, *MODELS), tests_of(options)),),
        seeds={"cpu": 2},
        differs=(
            "The paper has no such figure: the text is the source of Python packages (data/python_source.py).",
            *SMALL,
        ),
        draw=draw,
        findings=findings,
        about=ABOUT,
        curves=CURVES,
    )


@command(Figure6Options, overrides=True)
def main(options: Figure6Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
