"""A plan in words: why each choice (`reasons.py`), what an expert would say (`advice.py`), how each number was computed
(`derive.py`), two plans side by side (`compare.py`), and a picture (`plot.py`)."""
