"""Which layouts there are (`space.py`), the best of them (`best.py`), for every choice of pools (`fleet.py`), what lies
around it (`around.py`), and why there is none (`infeasible.py`)."""
