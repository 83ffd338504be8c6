"""Model versions: find, verify, load, try and switch them.

`repository` reads the files, `loader` turns them into a running model, `manager` decides which
versions are served, `versions` switches between them, and requests find them in `registry`.
"""
