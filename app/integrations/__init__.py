"""FluxChat inside other programs: lmms-eval, and a Hugging Face Space."""
