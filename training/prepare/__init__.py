"""Published and own data sets, in their own files, as a Hugging Face dataset: `python -m training.prepare --help`."""
