"""Hugging Face model directories, in and out, tensor by tensor.

weight_files.py   which files hold the weights      header.py    what is in one, checked
sources.py        a tensor from ranks' parts or quantised numbers
convert.py        our parameters ↔ stored tensors   (the tables are in zoo/hugging_face)
read.py           a directory, looked through before it is read
write.py          a model into a new directory      new_directory.py   ... whole or not at all
export_run.py     a run's weights out, with card.py
import_run.py     a run from a directory's weights; hub.py finds it
"""

from colossus.checkpoint.hugging_face.export_run import Exported, export_run
from colossus.checkpoint.hugging_face.import_run import import_run
from colossus.checkpoint.hugging_face.read import Directory, open_directory
from colossus.checkpoint.hugging_face.write import Written, write_directory

__all__ = [
    "Directory",
    "Exported",
    "Written",
    "export_run",
    "import_run",
    "open_directory",
    "write_directory",
]
