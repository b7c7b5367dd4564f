"""Input formats: a file per format; `detect.open_source` recognises the format and opens it."""
