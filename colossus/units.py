"""Units as people write and read them: `10M` tokens, `1.5 GiB`, `3 min`. Names in code carry the unit instead."""

import re

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_number(text: str) -> float:
    """`"10M"` → 1e7. Accepts k, M, B (or G) and T, decimals, exponents and underscores.

    Raises ValueError when the text is not a number.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kKmMbBgGtT]?)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number; write for example 2000, 10M or 1.5B")
    return float(match[1].replace("_", "")) * _DECIMAL[match[2].lower()]


def format_count(value: float) -> str:
    """12_800_000 → `"12.8M"`; three significant digits."""
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def format_bytes(value: float) -> str:
    """1_610_612_736 → `"1.50 GiB"`; binary units."""
    for suffix, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {suffix}"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """75.2 → `"1:15"`, 5400 → `"1:30:00"`, 3.21 → `"3.2 s"`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
