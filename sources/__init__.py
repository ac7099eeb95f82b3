"""Where training rows come from: stored, streamed, live and planted activations, and the batches made of them."""
