"""Starting a run: which rank a process is, and all ranks of a run on this machine."""
