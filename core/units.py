"""Units of what the program prints."""

MB = 10**6  # bytes
GB = 10**9  # bytes
