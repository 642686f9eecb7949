"""What a recipe names, opened: model, store, prompts, reward, judge."""
