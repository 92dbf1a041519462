"""Models by name, as functions that return a ModelSpec.

zoo.find("llama3.1-8b")       the model of a name, as people write it
zoo.load("mine.toml")         ... or the one in a file
zoo.names()                   all names
zoo.source("grok-1")          where its numbers are from
"""

from colossus.zoo.registry import family, find, load, names, source

__all__ = ["family", "find", "load", "names", "source"]
