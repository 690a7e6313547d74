"""Every figure of the kernels that needs a GPU, in at most nine minutes.

`bench` runs the tasks, `checks` is what must be right, `stages` times the kernels apart, `bars` holds the results
against what the project has promised, `plots` draws them.
"""
