"""The wrappers that take a block's MHA, its norm and its FFN in hand.

A candidate MHA has three kinds of wrappers: `MHALayer` around the attention, which computes it or leaves it out;
`NormLayer` around a norm that only serves it; `FFNLayer` around the FFN, in front of which the PIA stands. What they
must agree on, above all which adapters skip the MHA, they share through one `Candidate`.
"""

from .adapted import AdaptedLayer
from .base import EASLayer, NormLayer
from .candidate import Candidate
from .ffn import FFNLayer
from .mha import MHALayer

__all__ = ["AdaptedLayer", "Candidate", "EASLayer", "FFNLayer", "MHALayer", "NormLayer"]
