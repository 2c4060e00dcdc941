"""How adapters go into a model: the tuner that puts them there, targets, checks of what is given, trained tokens."""
