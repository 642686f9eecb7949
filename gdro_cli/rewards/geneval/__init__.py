"""The GenEval reward: does the image contain the objects that the prompt describes?

detection.py    the interfaces of a detector and a colour classifier
rules.py        the official rules and the rewards, as pure functions
reward.py       detector + colours + rules = a reward
mask2former.py, clip_colour.py     the original's models, through transformers
pretrained.py                      their files: a folder, or the Hub's cache
segmenter.py, palette.py           the embedded world's detector and colour classifier
"""
