"""How prepared images lie on disk beside the image files. A format is one module, chosen by ``format``:

``write(config, prepared) -> Path``: the folder, inside the prepared one, of the files that a loader reads; what is
complete there is used again.

``check(folder) -> None``: re-read every file of this format in a prepared folder; DataError when one has changed.
"""
