"""Trains image classifiers: `data` and `nets` in, a state_dict checkpoint out.

`loop` is the training itself, `evaluate` the measurement, `checkpoints` what is kept, `tracking`
what is written down along the way.
"""
