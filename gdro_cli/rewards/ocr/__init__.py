"""The OCR reward: is the text that the prompt asks for readable in the image?

reward.py   the reward: how it describes itself, and how it scores an image
rules.py    the reward of a recognised text, as pure functions
engine.py   PaddleOCR, wrapped in one small class
models.py   where PaddleOCR's weights come from
"""
