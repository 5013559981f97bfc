"""Units of what the program prints."""

MB = 10**6  # bytes
