"""Text from a model: sampling, conversations, and the server of forge_common.chat.

May import: errors, data, model, routing.
"""
