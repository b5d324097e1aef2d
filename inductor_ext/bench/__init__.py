"""``inductor-ext bench model``: a whole Hugging Face model, eager, through stock Inductor and through this backend, in one run.

    workload.py   which texts a step holds: B × L, given lengths or a distribution of lengths, padded or packed
    model.py      the models by name, built from their configs with random weights
    quantize.py   their linear layers in FP8, by torchao where it can
    sides.py      what is compared, and what one side needs to know (`Job`)
    worker.py     the process of one side: builds, compiles, then answers "measure" and the like
    run.py        starts the workers, asks them in turn, puts the results together
    breakdown.py  a step's kernels by class
    floor.py      the time that the shapes alone ask for
    summary.py    what is written of a result, as JSON
    chart.py, page.py   the results as a PNG and as one HTML file

Nothing here is imported by the backend; transformers, torchao and matplotlib are imported when they are used.
"""
