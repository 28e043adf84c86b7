"""Exports for other programs: Transformers models, PEFT adapters and GGUF files. Each is compared with the model here
before it has its name.

configuration_forge.py and modeling_forge.py are copied into the folder of an exported model; they import nothing of
this package.

May import: errors, files, model, data, routing, artifacts.
"""
