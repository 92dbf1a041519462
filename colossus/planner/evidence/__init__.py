"""Predictions beside published measurements (`published.py`, `validate.py`), the fit of the constants to them
(`calibrate.py`), and how sure an estimate is (`intervals.py`)."""
