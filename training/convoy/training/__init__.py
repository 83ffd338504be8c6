"""Training: images and a recipe in, a calibrated checkpoint out.

`recipe` holds the settings, `data` loads, splits and caches images, `readers` batches them on the
device, and `augment` and `normalization` turn pixels into inputs. `nets` makes a net by name.
`loop` trains one epoch after another with `optim`, `schedules` and `distributed`; `evaluate`
scores the net and fits its temperature. `run` connects these parts for one run and keeps its
`checkpoints`. `tracking` and `report` record the metrics, `console` shows them. `describe` lists a
net layer by layer, `filters` holds the lecture's fixed filters.
"""

from importlib.metadata import version

__version__ = version("convoy-serving")
