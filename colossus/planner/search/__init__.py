"""Which layouts there are (`space.py`), what bounds them (`bounds.py`), the best of them (`best.py`, `refine.py`), for
every choice of pools (`fleet.py`), what lies around it (`around.py`), and why there is none (`infeasible.py`)."""
