"""What a trained model can do: its loss on any text, and tasks of lm-eval.

score.py      log-probabilities of tokens: the one function that all of it rests on
pieces.py     documents, out of files or a corpus        windows.py   ... in windows as long as the context
text.py       loss, perplexity and bits per byte of them
language_model.py   a model as lm-eval knows one         tasks.py     its tasks: found, run, and what came of them

lm-eval is an extra, so `language_model` and `tasks` are imported by their own names.
"""

from colossus.evaluate.pieces import File, held_out_pieces, text_pieces
from colossus.evaluate.score import Scores, score
from colossus.evaluate.text import TextLoss, text_losses
from colossus.evaluate.windows import Piece, windows

__all__ = [
    "File",
    "Piece",
    "Scores",
    "TextLoss",
    "held_out_pieces",
    "score",
    "text_losses",
    "text_pieces",
    "windows",
]
