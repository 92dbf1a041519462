"""Models by name, as functions that return a ModelSpec."""
