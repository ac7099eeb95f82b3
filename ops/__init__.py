"""Math on few of many latents: products, selection, kernels, what processes exchange; complete files. torch alone."""
