"""The GenEval reward: what is in the picture, and does it fit the prompt?

detection.py    what a detector and a colour classifier give
rules.py        the official rules and the rewards, as pure functions
reward.py       detector + colours + rules = a reward
mask2former.py, clip_colour.py     the models of the original, through transformers
pretrained.py                      their files: a folder, or the Hub's cache
segmenter.py, palette.py           the small ones that the embedded world uses
"""
