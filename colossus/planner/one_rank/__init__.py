"""The plan of one process on the machine at hand, which `colossus train` runs."""
