"""The judge of quality: what does a picture look like to someone who knows nothing of the reward?

base.py               what a judge is, and a judge in the place of a reward
embedded.py           the small one that the embedded world uses
unified_reward.py     UnifiedReward 2.0 behind an endpoint
unified_prompt.py     what it is asked, and how its answer is read
endpoint.py           requests, retries, refusals
"""
