"""Language models and texts to paired rows: the only folder that imports nnsight and transformers."""
