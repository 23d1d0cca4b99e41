"""The cache format: named arrays of rows in, named arrays of rows out. NumPy and h5py only; torch never."""
