"""The families of models, one file each, and what packed latents and editing have in common."""
