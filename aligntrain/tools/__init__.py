"""What is done with a model besides training: generate, evaluate, preview, convert."""
