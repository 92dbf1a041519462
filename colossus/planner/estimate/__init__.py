"""One step's time and memory, for any number of candidates at once.

Records of arrays (`columns.py`) describe a model (`shape.py`), its layout and the hardware (`execution.py`). A chip's
own work (`compute.py`) and collectives (`network.py`) make a layer (`layers.py`); layers make a step (`step.py`); what
a rank holds meanwhile is in `memory.py`. The fitted constants are in `constants.toml` and `memory.toml`.
"""
