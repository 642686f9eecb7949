"""The judge of quality: how good is an image, regardless of the reward?

base.py                  the interface of a judge, and a judge used as a reward
embedded.py              the small judge of the embedded world
unified_reward.py        UnifiedReward 2.0 behind an endpoint
unified_reward_local.py  the same model in this process
unified_prompt.py        its prompt, and how its answer is read
endpoint.py              requests to the endpoint, and its errors
"""
