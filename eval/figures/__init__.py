"""The paper's figures, one file each, and what they share.

declare.py    what a figure consists of: subjects, panels, tests, scales, options
plan.py       the runs and tests that follow from it, their costs, and which are done
make.py       the stages of a figure, in order
search.py     the learning rate of each model
measures.py   how a trained run is tested
panels.py     how points are drawn
folder.py     the files that a figure writes; caption.py makes the text among them
"""
