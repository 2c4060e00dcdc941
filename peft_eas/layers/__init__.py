"""The wrappers that take a block's MHA, its norm and its FFN in hand.

A candidate MHA has five kinds of wrappers: `MHALayer` around the attention, which computes it or leaves it out;
`NormLayer` around a norm that only serves it; `FFNLayer` around the FFN, in front of which the PIA stands;
`KeptFFNLayer` inside of it, for what stands there where the MHA is kept; and `OutputLayer` around the projection that
writes the FFN's output, beside which the output adapter stands. What they must agree on, above all which adapters skip
the MHA, they share through one `Candidate`.
"""

from .adapted import AdaptedLayer
from .base import EASLayer, NormLayer
from .candidate import Candidate
from .ffn import FFNLayer
from .kept_ffn import KeptFFNLayer
from .low_rank import LowRankAdapter
from .mha import MHALayer
from .output import OutputLayer
from .routed import RoutedLayer

__all__ = [
    "AdaptedLayer",
    "Candidate",
    "EASLayer",
    "FFNLayer",
    "KeptFFNLayer",
    "LowRankAdapter",
    "MHALayer",
    "NormLayer",
    "OutputLayer",
    "RoutedLayer",
]
