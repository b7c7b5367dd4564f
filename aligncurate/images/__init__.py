"""From bytes to pixels: limits, decoding, preprocessing, on the CPU or a GPU."""
