"""Reading and writing files safely: atomic writes, strict JSON and safetensors, checks of untrusted input.

May import: errors. No knowledge of models, data or runs.
"""
