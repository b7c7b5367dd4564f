"""From image bytes to pixels: formats, limits, decoding and preprocessing, on the CPU or a GPU."""
