"""The command line: `python -m scree`, and the script `scree`.

It needs typer and rich, which the library does not: ``pip install "scree[cli]"``.
"""
