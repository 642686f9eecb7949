"""A vision-language model behind an endpoint as a reward."""
