"""The OCR reward: is the text that the prompt asks for readable in the image?

reward.py   what the rest of the program knows of it, and from image to score
rules.py    the reward of a recognised text, as pure functions
engine.py   PaddleOCR behind one small class
models.py   where its weights come from
"""
