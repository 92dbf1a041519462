"""Which layouts there are (`space.py`), the best of them (`best.py`), and why there is none (`infeasible.py`)."""
