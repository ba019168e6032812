"""Questions from rows: files of the user, data sets of the Hugging Face Hub, published benchmarks."""
