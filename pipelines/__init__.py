"""Complete runs as scripts: the paper's recipe, a run on photos, and training of the built-in models."""
