"""Flow models behind one interface: the only package that imports diffusers, transformers and peft."""
