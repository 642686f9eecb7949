"""The mathematics: pure functions on tensors and plain numbers, with no model, file, recipe or global state.

Shapes in this package: B prompts (= groups), K images per group, N = B*K images, ``...`` = the latent dims
of one image.
"""
