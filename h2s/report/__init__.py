"""What came of it: numbers, words, a sheet."""
