"""What other programs load: Transformers models, PEFT adapters and GGUF files, each compared with the model before it
has its name.

configuration_forge.py and modeling_forge.py are copied into the folder of an exported model; they import nothing of this package.

May import: errors, files, model, data, routing, artifacts.
"""
