"""The judge of quality: what does an image look like to someone who knows nothing about the reward?

base.py                  what a judge is, and a judge used as a reward
embedded.py              the small judge of the embedded world
unified_reward.py        UnifiedReward 2.0 behind an endpoint
unified_reward_local.py  the same model in this process
unified_prompt.py        its question, and how its answer is read
endpoint.py              requests and refusals
"""
