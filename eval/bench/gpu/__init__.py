"""All measurements of the kernels that need a GPU, in at most nine minutes.

`bench` runs groups of `tasks`, each in a process of its own (`group`); `checks` verifies the kernels, `stages` times
them one by one, `bars` compares the results with the project's targets, `plots` draws them.
"""
