"""How a search chooses: plain numbers, no tensors of a model."""
