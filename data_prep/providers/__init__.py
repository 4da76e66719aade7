"""Where images come from. A provider is one module with two functions, chosen by ``dataset.provider``:

``identity(dataset) -> dict``: what the images are known by, as JSON; a prepared set that was made
from another identity is refused.

``fetch(dataset, folder) -> Path``: the root of an ImageFolder tree (train/CLASS/IMAGE, test/CLASS/IMAGE). What it
writes goes through ``data_prep.target.filling(folder)``.

With ``dataset.source`` set, ``folder`` is used whatever the provider is.
"""
