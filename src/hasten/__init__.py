"""hasten: the Transformers you already have, faster, without changing what they compute."""
