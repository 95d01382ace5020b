"""Published and own data sets, in their own files, as a Hugging Face dataset: `hsvlt prepare --help`."""
