"""Real images in: get a data set, check every image, freeze the class order. Runs once for each data set."""

from data_prep.prepare import prepare
from data_prep.verify import verify

__all__ = ["prepare", "verify"]
