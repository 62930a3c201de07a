"""The laboratory behind benchmark.py and the scripts beside this folder: what measures, and how results are written."""
