"""From a trained crosscoder to measurements, examples, figures and the page."""
