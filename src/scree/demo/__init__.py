"""A real pretrained model on real text, without padding: what `python -m scree demo` runs.

The texts are the docstrings of Python's own standard library (`corpus`), the model is all-MiniLM-L6-v2
(`pretrained`), written once over scree's operations for every framework (`minilm`) and once more in the usual padded
way (`padded`), to compare the two (`compare`).

It needs more than NumPy: ``pip install "scree[demo]"``. Nothing is fetched at run time.
"""
