"""Curves that people give to `opt-ops signals replay`: exports of W&B, TensorBoard and other tools, and our telemetry.

`files` reads a file as rows of cells, `columns` knows which column is what, `points` makes points of cells,
`overflows` tells fp16's skipped updates, and `read` puts these together.
"""
