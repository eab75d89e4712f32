"""The gates: hidden states to the ids and scores of each token's experts, and a loss that keeps experts evenly used."""

from .base_gate import BaseGate
from .dc_gate import DCGate
from .faster_gate import FasterGate, gen_faster_gate
from .gshard_gate import GShardGate
from .naive_gate import NaiveGate
from .noisy_gate import NoisyGate
from .swipe_gate import SwipeGate
from .switch_gate import SwitchGate
from .zero_gate import ZeroGate

__all__ = [
    "BaseGate",
    "DCGate",
    "FasterGate",
    "GShardGate",
    "NaiveGate",
    "NoisyGate",
    "SwipeGate",
    "SwitchGate",
    "ZeroGate",
    "gen_faster_gate",
]
