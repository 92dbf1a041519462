"""What turns gradients into updates: AdamW (torch's, or with averages in bfloat16), Muon, row-wise Adagrad, balancing
of experts; and learning-rate schedules."""

from colossus.optim.adamw import NarrowAdamW
from colossus.optim.balancing import Balancing
from colossus.optim.build import (
    Optimizers,
    build_optimizers,
    gradient_norm,
    optimizers_of,
    scale_gradients,
    set_learning_rates,
)
from colossus.optim.muon import Muon
from colossus.optim.row_adagrad import RowAdagrad
from colossus.optim.schedules import multiplier

__all__ = [
    "Balancing",
    "Muon",
    "NarrowAdamW",
    "Optimizers",
    "RowAdagrad",
    "build_optimizers",
    "gradient_norm",
    "multiplier",
    "optimizers_of",
    "scale_gradients",
    "set_learning_rates",
]
